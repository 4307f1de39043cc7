"""Compiles the C kernels once per machine and source, and never gets in the way when it cannot.

The library is built with the system's C compiler into the user's cache directory under a name
that hashes everything it depends on: sources, compiler, flags, CPU features, and the OpenMP
runtime, which is torch's own, so that both share one pool of threads. It appears there by an
atomic rename; concurrent builders do the same work twice and agree. A missing compiler, a failed
or slow compilation or an unwritable directory all mean `None`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).resolve().parent / "native"
_SOURCES = ("paged_attention.c", "row_ops.c", "copies.c")
COMPILE_TIMEOUT_S = 120.0
_FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
)


def build_library() -> Path | None:
    """Path of the compiled library, built now unless the cache has it; None if it cannot be."""
    try:
        return _build()
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("CPU kernels in C are unavailable, using torch instead: %s", _reason(error))
        return None


def _build() -> Path:
    """Find or build the library; raises where `build_library` answers None."""
    command = _command()
    directory = _cache_dir()
    target = directory / f"kernels-{_fingerprint(command)}.so"
    if not target.exists():
        _compile(command, directory, target)
    return target


def _command() -> list[str]:
    """The compiler and its flags, without inputs and output."""
    if sys.platform != "linux":
        raise RuntimeError(f"they are built on Linux only, this is {sys.platform}")
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, gcc or clang)")
    return [compiler, *_FLAGS, "-fopenmp", *(str(SOURCE_DIR / name) for name in _SOURCES)]


def _openmp_runtime() -> Path:
    """The libgomp that torch has loaded."""
    package = Path(torch.__file__).resolve().parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for path in sorted(folder.glob("libgomp*.so*")):
            return path
    raise RuntimeError("torch comes without libgomp")


def _fingerprint(command: list[str]) -> str:
    """Hash of all that the library's content and fitness for this machine depend on."""
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S
    )
    parts = [*command, str(_openmp_runtime()), platform.machine(), _cpu_features()]
    digest = hashlib.blake2b("\0".join(parts).encode() + version.stdout, digest_size=12)
    for source in sorted(SOURCE_DIR.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _cpu_features() -> str:
    """The CPU's model and feature flags, as Linux lists them for its first core."""
    keys = ("model name", "flags", "Features", "CPU part")
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        core = file.read().split("\n\n", 1)[0]
    return "\n".join(line for line in core.splitlines() if line.startswith(keys))


def _cache_dir() -> Path:
    """A private directory to keep libraries in; a temporary one where home is not writable."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(base).expanduser() / "tierkv" / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid():
            return directory
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tierkv-kernels-"))


def _compile(command: list[str], directory: Path, target: Path) -> None:
    """Compile to a temporary name and rename it to the target."""
    handle, name = tempfile.mkstemp(dir=directory, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        subprocess.run(
            [*command, "-o", name, str(_openmp_runtime()), "-lm"],
            capture_output=True,
            check=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        temporary.chmod(0o700)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """One line about a failure, with the compiler's first error if it told one."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or b"").decode(errors="replace").splitlines()
        told = next((line for line in lines if "error" in line), f"exit status {error.returncode}")
        return f"{error.cmd[0]} failed: {told}"
    return str(error)
