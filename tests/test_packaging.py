"""What an installation contains: every room once, below `tierkv`, and nothing beside it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

LINKED = ("kernels", "policies", "storage")
NOT_COPIED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


def run(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from the unpacked sdist."""
    out = tmp_path_factory.mktemp("dist")
    tree = out / "tree"
    shutil.copytree(
        repository, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED, "tests")
    )
    build = "from setuptools import build_meta; build_meta.build_{}({!r})"
    run("-c", build.format("sdist", str(out)), cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    run("-c", build.format("wheel", str(out)), cwd=unpacked)
    return out


def expected_files(repository: Path) -> set[str]:
    """Every Python file of the package, by its path in a wheel."""
    found = {
        str(path.relative_to(repository))
        for path in (repository / "tierkv").rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    for folder in LINKED:
        paths = (repository / folder).rglob("*")
        code = [path for path in paths if path.suffix in (".py", ".c", ".h")]
        assert code, folder
        found |= {f"tierkv/{path.relative_to(repository)}" for path in code}
    profiles = sorted((repository / "configs" / "hardware").glob("*.yaml"))
    assert profiles
    return found | {f"tierkv/sim/profiles/{path.name}" for path in profiles}


def test_the_wheel_holds_every_room_below_tierkv(distributions: Path, repository: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected_files(repository) <= names
    assert "tierkv/py.typed" in names
    assert {name for name in names if name.endswith("LICENSE")}
    tops = {name.partition("/")[0] for name in names}
    version = importlib.metadata.version("tierkv")
    assert tops == {"tierkv", f"tierkv-{version}.dist-info"}


def test_the_sdist_holds_files_instead_of_links(distributions: Path, repository: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    files = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert expected_files(repository) <= files
    assert not [member.name for member in members if member.issym()]


def test_an_installed_wheel_imports_from_anywhere(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import tierkv, tierkv.kernels, tierkv.policies.registry, tierkv.storage\n"
        "print(tierkv.__file__, tierkv.kernels.__file__)"
    )
    assert run("-c", program, cwd=tmp_path).count(str(site)) == 2


@pytest.mark.parametrize("folder", [*LINKED, "model", "server", "engine"])
def test_rooms_are_not_top_level_modules(folder: str, repository: Path, tmp_path: Path) -> None:
    program = f"import importlib.util as u; s = u.find_spec({folder!r}); print(s and s.origin)"
    assert str(repository) not in run("-c", program, cwd=tmp_path)
    assert str(repository) not in run("-c", program, cwd=repository)


def test_transformers_works_from_the_repository_root(repository: Path) -> None:
    program = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "    num_attention_heads=1, vocab_size=8)\n"
        "LlamaForCausalLM(config)\n"
        "print('kernels available:', is_kernels_available())"
    )
    assert "kernels available" in run("-c", program, cwd=repository)


def test_tests_do_not_see_the_root_either(repository: Path) -> None:
    assert str(repository) not in sys.path
    assert "" not in sys.path


def third_party_imports(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"tierkv"}


def declared(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return match.group().lower().replace("-", "_")


def test_every_import_is_a_declared_dependency(repository: Path) -> None:
    requirements = importlib.metadata.requires("tierkv") or []
    names = {declared(r) for r in requirements if "extra ==" not in r}
    optional = [r for r in requirements if re.search(r'extra == "(server|cuda|fp8|otel|bench)"', r)]
    import_names = {"pyyaml": "yaml", "pyzmq": "zmq", "opentelemetry_sdk": "opentelemetry"}
    base = {import_names.get(name, name) for name in names}
    extras = {import_names.get(name, name) for name in map(declared, optional)}
    used = {folder: third_party_imports(repository / folder) for folder in ("tierkv", *LINKED)}
    assert used["tierkv"], "the scan found no import at all"
    for folder, imports in used.items():
        assert imports <= base | extras, f"{folder}: undeclared {imports - base - extras}"
