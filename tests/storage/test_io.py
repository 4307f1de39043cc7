"""The I/O engine, aligned memory, the arena: whole operations or errors, no lock held."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_blocks import PAYLOAD_BYTES, cause, open_nvme, write_of

from tierkv.errors import ConfigError
from tierkv.storage import io_posix, record
from tierkv.storage.arena import HostArena
from tierkv.storage.base import Cause
from tierkv.storage.io import aligned, copy, is_aligned
from tierkv.storage.io_posix import PosixIo

BIG = 64 << 20


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """How often another thread ran; it only can when the lock is given up voluntarily."""
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    sys.setswitchinterval(60.0)
    time.sleep(0.01)  # a request to give up the lock that was made before is served
    try:
        yield lambda: ticks[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def test_copies_and_checksums_release_the_interpreter() -> None:
    source, target = aligned(BIG), aligned(BIG)
    with counting() as ticks:
        target[:] = source  # faults the pages in
        before = ticks()
        target[:] = source
        assert ticks() == before, "the counter does not count what it should"
        for work in (lambda: copy(target, source), lambda: record.digest(source)):
            before = ticks()
            for _ in range(50):  # on a busy machine the other thread may have no core
                work()
                if ticks() > before + 50:
                    break
            assert ticks() > before + 50


def test_alignment_is_seen() -> None:
    memory = aligned(3 * 4096)
    assert is_aligned(memory)
    assert is_aligned(memory[4096:])
    assert not is_aligned(memory[1:4097])
    assert not is_aligned(memory[:100])


def test_the_arena_is_one_aligned_range() -> None:
    arena = HostArena(5, 5000)
    assert (arena.stride, arena.num_bytes) == (8192, 5 * 8192)
    assert arena.address % 4096 == 0
    view = arena.view(3)
    assert (view.nbytes, is_aligned(view[:4096])) == (5000, True)
    view[:] = b"x" * 5000
    assert arena.numpy(3).tobytes() == b"x" * 5000
    assert arena.numpy(2, 2).shape == (2, 5000)
    assert not arena.numpy(2).any() and not arena.numpy(4).any()
    arena.numpy(1)[:] = 7
    assert bytes(arena.view(1)) == b"\x07" * 5000


def test_an_arena_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match="cpu_cache_size="):
        HostArena(1 << 40, 1 << 20)


@pytest.mark.parametrize("is_direct", [True, False])
def test_many_buffers_are_one_range(tmp_path: Path, is_direct: bool) -> None:
    """More buffers than one system call takes."""
    count = io_posix.MAX_VECTORS + 10
    io = PosixIo(tmp_path / "file", count * 4096, direct=is_direct)
    memory = aligned(count * 4096)
    memory[:] = os.urandom(count * 4096)
    parts = [memory[i * 4096 : (i + 1) * 4096] for i in range(count)]
    io.pwritev(parts, 0)
    io.sync()
    back = aligned(count * 4096)
    assert io.preadv([back[i * 4096 : (i + 1) * 4096] for i in range(count)], 0) == len(back)
    assert back == memory
    io.close()


def test_short_operations_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = PosixIo(tmp_path / "file", 8 * 4096, direct=False)
    monkeypatch.setattr(os, "pwritev", lambda fd, bufs, at: os.pwrite(fd, bufs[0][:1000], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, bufs, at: fill(bufs[0], os.pread(fd, min(700, bufs[0].nbytes), at))
    )
    data, back = memoryview(os.urandom(8 * 4096)), aligned(8 * 4096)
    io.pwritev([data[:5000], data[5000:]], 0)
    assert io.preadv([back[:9000], back[9000:]], 0) == len(back)
    assert back == data
    io.close()


def fill(buffer: memoryview, data: bytes) -> int:
    buffer[: len(data)] = data
    return len(data)


def test_a_write_that_makes_no_progress_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = PosixIo(tmp_path / "file", 4096)
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="nothing was written"):
        io.pwritev([aligned(4096)], 0)
    io.close()


@pytest.mark.parametrize("size", [4096 * 3, 4096 * 3 + 100])
@pytest.mark.parametrize("is_direct", [True, False])
def test_reading_past_the_end_is_short(tmp_path: Path, size: int, is_direct: bool) -> None:
    io = PosixIo(tmp_path / "file", 4096 * 8, direct=is_direct)
    os.truncate(tmp_path / "file", size)
    assert io.preadv([aligned(4096)] * 8, 0) == size
    io.close()


def test_it_falls_back_to_buffered_and_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def no_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_open(path, flags, mode)

    def no_fallocate(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")

    monkeypatch.setattr(os, "open", no_direct)
    monkeypatch.setattr(os, "posix_fallocate", no_fallocate)
    with caplog.at_level("INFO"):
        io = PosixIo(tmp_path / "file", 1 << 20)
    assert "buffered, 1 MiB sparse" in caplog.text
    assert not io.is_direct
    assert (tmp_path / "file").stat().st_size == 1 << 20
    io.close()


def test_a_file_system_that_cannot_allocate_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """glibc's `posix_fallocate` would write into every block of it."""

    class Library:
        def fallocate(self, *_: object) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    def emulated(*_: object) -> None:
        raise AssertionError("every block is written")

    monkeypatch.setattr(io_posix, "_libc", Library())
    monkeypatch.setattr(os, "posix_fallocate", emulated)
    with caplog.at_level("INFO"):
        io = PosixIo(tmp_path / "file", 20 << 30)
    assert "20480 MiB sparse" in caplog.text
    assert (tmp_path / "file").stat().st_blocks == 0
    io.close()


def test_this_file_system_is_asked(tmp_path: Path) -> None:
    PosixIo(tmp_path / "file", 1 << 20).close()
    is_allocated = (tmp_path / "file").stat().st_blocks * 512 >= 1 << 20
    descriptor = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    assert io_posix.can_allocate(descriptor) == is_allocated
    os.close(descriptor)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_too_small_is_refused_with_the_numbers(small_disk: Path) -> None:
    with pytest.raises(ConfigError, match=r"nvme_cache_size=\d+: .* has room for \d+ bytes more"):
        open_nvme(small_disk / "store", capacity=1000)


def test_a_disk_that_fills_up_is_a_typed_failure(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fallocate(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")

    monkeypatch.setattr(os, "posix_fallocate", no_fallocate)
    store = open_nvme(small_disk / "store", capacity=1000)
    causes = [cause(store.write([write_of(n, n)])[0]) for n in range(250)]
    assert causes[0] is None
    assert causes[-1] is Cause.NO_SPACE
    assert {*causes} == {None, Cause.NO_SPACE}
    store.close()
    again = open_nvme(small_disk / "store", capacity=1000)
    assert len(again.recover()) == causes.count(None)
    assert again.slot_payload_bytes == PAYLOAD_BYTES
    again.close()
