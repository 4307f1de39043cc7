"""Decisions load no torch, policies nothing but the standard library.

The import contracts themselves are in `pyproject.toml` and checked by `make check`; here is what
an interpreter really loads.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TORCH_FREE = (
    "tierkv",
    "tierkv.cache.tiered_cache",
    "tierkv.cli.main",
    "tierkv.engine.scheduler",
    "tierkv.policies.registry",
    "tierkv.storage",
)


def loaded_after_import(module: str, cwd: Path) -> set[str]:
    program = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_loads_no_torch(module: str, tmp_path: Path) -> None:
    loaded = loaded_after_import(module, tmp_path)
    assert module in loaded
    assert not {"torch", "transformers"} & loaded


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_policies_use_the_standard_library_only(repository: Path) -> None:
    ours = ("tierkv.policies", "tierkv.types", "tierkv.errors")
    files = sorted((repository / "policies").rglob("*.py"))
    assert files
    for path in files:
        foreign = {
            name
            for name in imported_modules(path)
            if name.partition(".")[0] not in sys.stdlib_module_names and not name.startswith(ours)
        }
        assert not foreign, f"{path} imports {foreign}"
