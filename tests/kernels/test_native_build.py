"""The C library is an extra: whatever goes wrong with it, torch takes over."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest
import torch

from tierkv.kernels import cpu_native, native_build, ops
from tierkv.kernels.metadata import build_metadata


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A process that has not built anything, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu_native.library.cache_clear()
    yield tmp_path
    cpu_native.library.cache_clear()
    ops.set_backend("auto")


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Make this shell script the C compiler."""
    compiler = folder / "mycc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))


def attend() -> torch.Tensor:
    """Any attention at all."""
    meta = build_metadata([1], [3], [[0]], 16)
    return ops.paged_attention(torch.ones(1, 2, 16), torch.ones(1, 2, 2, 16, 16), meta, scale=1.0)


def assert_falls_back(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    with caplog.at_level(logging.WARNING):
        assert torch.allclose(attend(), torch.ones(1))
        attend()
    assert ops.get_backend() == "torch"
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("tierkv.kernels")]
    assert len(messages) == 1 and reason in messages[0]
    with pytest.raises(RuntimeError, match="native"):
        ops.set_backend("native")


def test_without_a_compiler(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert_falls_back(caplog, "no C compiler")


def test_a_compiler_that_fails(fresh, monkeypatch, caplog) -> None:
    script = '[ "$1" = --version ] && exit 0; echo "x.c:1: error: no such thing" >&2; exit 1'
    use_compiler(monkeypatch, fresh, script)
    assert_falls_back(caplog, "error: no such thing")
    assert not list((fresh / "cache").rglob("*.tmp"))


def test_a_compiler_that_hangs(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setattr(native_build, "COMPILE_TIMEOUT_S", 0.2)
    use_compiler(monkeypatch, fresh, '[ "$1" = --version ] && exit 0; exec sleep 60')
    assert_falls_back(caplog, "timed out")


def test_a_compiler_that_writes_rubbish(fresh, monkeypatch, caplog) -> None:
    script = '[ "$1" = --version ] && exit 0; while [ "$1" != -o ]; do shift; done; echo bad > "$2"'
    use_compiler(monkeypatch, fresh, script)
    assert_falls_back(caplog, "do not load")


def test_wrong_results_are_noticed(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cpu_native, "_works", lambda lib: False)
    monkeypatch.setattr(cpu_native, "_load", lambda: cpu_native.ctypes.CDLL(None))
    monkeypatch.setattr(cpu_native, "_declare", lambda lib: None)
    assert_falls_back(caplog, "wrong results")


def test_builds_once_and_repairs_a_damaged_cache(fresh, monkeypatch) -> None:
    flags = ["-O0" if flag == "-O2" else flag for flag in native_build._FLAGS]
    monkeypatch.setattr(native_build, "_FLAGS", tuple(flags))  # compiles in a fifth of the time
    path = native_build.build_library()
    if path is None:
        pytest.skip("no C compiler")
    assert path.is_relative_to(fresh)
    built = path.stat().st_mtime_ns
    assert native_build.build_library() == path and path.stat().st_mtime_ns == built
    path.write_bytes(b"damaged")
    assert cpu_native.library() is not None and path.stat().st_size > 1000


def test_torch_can_be_asked_for(fresh, monkeypatch) -> None:
    monkeypatch.setattr(cpu_native, "_load", lambda: pytest.fail("not wanted"))
    ops.set_backend("torch")
    assert ops.get_backend() == "torch" and torch.allclose(attend(), torch.ones(1))


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="'cuda' must be one of auto, torch, native"):
        ops.set_backend("cuda")
