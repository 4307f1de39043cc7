"""The I/O engine on kvikio: the real package where there is one, and one like it in Python.

The one like it does what kvikio 26.10 does: reading past the end fails, every error is a
RuntimeError with the system's text, and small buffers are done at once.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from store_blocks import key_of, open_nvme, payload_of, read_back, write_of

from tierkv.errors import ConfigError
from tierkv.storage import io_kvikio
from tierkv.storage.base import DONE
from tierkv.storage.io import aligned
from tierkv.storage.io_kvikio import KvikioIo

PAGE = 4096
THRESHOLD = 16384


class Result:
    def __init__(self, future: Future[int]) -> None:
        self.get = future.result


class FakeFile:
    """`kvikio.CuFile`."""

    def __init__(self, path: str, flags: str) -> None:
        assert flags == "r+"
        self._fd = os.open(path, os.O_RDWR)
        self._threads = ThreadPoolExecutor(4)
        self.gate: threading.Event | None = None
        self.num_running = 0

    def fileno(self) -> int:
        return self._fd

    def pread(self, buf: memoryview, size: int, file_offset: int) -> Result:
        return self._begin(self._read, buf, size, file_offset)

    def pwrite(self, buf: memoryview, size: int, file_offset: int) -> Result:
        return self._begin(self._write, buf, size, file_offset)

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._fd)

    def _begin(self, work, buf: memoryview, size: int, offset: int) -> Result:
        if size >= THRESHOLD:
            return Result(self._threads.submit(self._run, work, buf, size, offset))
        done: Future[int] = Future()
        done.set_result(self._run(work, buf, size, offset))
        return Result(done)

    def _run(self, work, buf: memoryview, size: int, offset: int) -> int:
        self.num_running += 1
        try:
            if self.gate is not None and size >= THRESHOLD:
                assert self.gate.wait(60)
            work(buf, size, offset)
        except OSError as error:
            reason = f"KvikIO failure at: /cpp/posix_io.hpp:1: POSIX error: {error.strerror}"
            raise RuntimeError(f"{reason}\nmore") from None
        finally:
            self.num_running -= 1
        return size

    def _read(self, buf: memoryview, size: int, offset: int) -> None:
        done = 0
        while done < size:
            count = os.preadv(self._fd, [buf[done:size]], offset + done)
            if count == 0:
                raise RuntimeError("KvikIO failure at: x:1: POSIX error on pread: EOF")
            done += count

    def _write(self, buf: memoryview, size: int, offset: int) -> None:
        done = 0
        while done < size:
            done += os.pwritev(self._fd, [buf[done:size]], offset + done)


class FakeKvikio(types.ModuleType):
    """`kvikio`, as far as it is used."""

    def __init__(self) -> None:
        super().__init__("kvikio")
        self.__version__ = "26.10.00"
        self.values = {"num_threads": 1, "task_size": 4 << 20, "auto_direct_io_read": False}
        self.CuFile = FakeFile
        self.defaults = types.ModuleType("kvikio.defaults")
        self.defaults.__dict__.update(
            set=self._set, get=self.values.__getitem__, is_compat_mode_preferred=lambda: False
        )
        self.cufile_driver = types.ModuleType("kvikio.cufile_driver")
        self.cufile_driver.__dict__.update(get={"is_gds_available": True}.__getitem__)

    def _set(self, config: dict[str, object]) -> None:
        for name, value in config.items():
            self.values[name]  # a KeyError, as in versions that do not know it
            self.values[name] = value


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    made = FakeKvikio()
    for module in (made, made.defaults, made.cufile_driver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for _, variables in io_kvikio._SETTINGS.values():
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
    return made


@lru_cache
def real_works() -> bool:
    """Whether kvikio and libcuda are here; asked in another process, which it may end."""
    code = (
        "import kvikio, mmap, tempfile; f = tempfile.NamedTemporaryFile(); f.write(bytes(4096));"
        "f.flush(); file = kvikio.CuFile(f.name, 'r'); page = memoryview(mmap.mmap(-1, 4096));"
        "file.pread(page).get(); file.close()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.fixture(params=["fake", "real"])
def any_kvikio(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "fake":
        request.getfixturevalue("fake")
    elif not real_works():
        pytest.skip("kvikio and libcuda are not here")
    yield


def random_buffers(rng: random.Random) -> list[memoryview]:
    """Pages and parts of pages, some of them not at the start of one."""
    memory = aligned(64 * PAGE)
    memory[:] = rng.randbytes(len(memory))
    places = sorted(rng.sample(range(1, len(memory)), 6))
    return [memory[a:b] for a, b in zip([0, *places], [*places, len(memory)], strict=True)]


# ---------------------------------------------------------------------- bytes


def test_what_is_written_is_read(tmp_path: Path, any_kvikio: None) -> None:
    rng = random.Random(1)
    io = KvikioIo(tmp_path / "file", 100 * PAGE)
    for _ in range(20):
        offset = PAGE * rng.randrange(30)
        buffers = random_buffers(rng)
        io.pwritev([buffer.toreadonly() for buffer in buffers], offset)
        io.sync()
        with (tmp_path / "file").open("rb") as file:
            file.seek(offset)
            assert file.read(64 * PAGE) == b"".join(buffers)
        back = [aligned(buffer.nbytes) for buffer in buffers]
        for buffer in back:
            buffer[:] = b"\xee" * len(buffer)
        assert io.preadv(back, offset) == 64 * PAGE
        assert b"".join(back) == b"".join(buffers)
    io.close()


@pytest.mark.parametrize("size", [PAGE * 3, PAGE * 3 + 100, 20 * PAGE + 1, 0])
def test_reading_past_the_end_is_short(tmp_path: Path, size: int, any_kvikio: None) -> None:
    io = KvikioIo(tmp_path / "file", 64 * PAGE)
    data = random.Random(size).randbytes(64 * PAGE)
    io.pwritev([memoryview(data)], 0)
    os.truncate(tmp_path / "file", size)
    back = [aligned(8 * PAGE) for _ in range(8)]
    assert io.preadv(back, 0) == size
    assert b"".join(back)[:size] == data[:size]
    assert io.preadv([aligned(PAGE)], 64 * PAGE) == 0
    io.close()


def test_a_store_keeps_its_blocks(tmp_path: Path, any_kvikio: None) -> None:
    store = open_nvme(tmp_path / "store", 16, 32 << 10, open_io=KvikioIo)
    assert store.write([write_of(n, n, 32 << 10) for n in range(10)]) == [DONE] * 10
    store.close()
    store = open_nvme(tmp_path / "store", 16, 32 << 10, open_io=KvikioIo)
    assert [block.key for block in store.recover()] == [key_of(n) for n in range(10)]
    for n in range(10):
        assert read_back(store, n, n) == (DONE, payload_of(n, 32 << 10))
    store.close()


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, errno.ENOSPC), (errno.EIO, errno.EIO), (errno.ENODEV, errno.EIO)],
)
def test_errors_are_those_of_the_system(
    number: int, expected: int, tmp_path: Path, fake: FakeKvikio, monkeypatch
) -> None:
    io = KvikioIo(tmp_path / "file", 64 * PAGE)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", refuse)
    for size in (PAGE, 32 * PAGE):  # at once, and by the pool
        with pytest.raises(OSError, match=r"^\[Errno .*posix_io.hpp") as caught:
            io.pwritev([aligned(size)], 0)
        assert caught.value.errno == expected
    io.close()


@pytest.mark.parametrize("last", [PAGE, 32 * PAGE])
def test_nothing_is_in_use_after_a_failure(
    last: int, tmp_path: Path, fake: FakeKvikio, monkeypatch
) -> None:
    """One buffer fails while another is under way: both have ended when the error is raised."""
    io = KvikioIo(tmp_path / "file", 128 * PAGE)
    io._cufile.gate = threading.Event()
    write = os.pwritev

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 32 * PAGE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse)
    threading.Timer(0.1, io._cufile.gate.set).start()
    with pytest.raises(OSError, match="Input/output error"):
        io.pwritev([aligned(32 * PAGE), aligned(last)], 0)
    assert io._cufile.num_running == 0
    io.close()


# ---------------------------------------------------------------------- preflight


def test_defaults_are_raised_and_told(tmp_path: Path, fake: FakeKvikio, caplog) -> None:
    with caplog.at_level("INFO"):
        KvikioIo(tmp_path / "file", PAGE).close()
    assert fake.values == {"num_threads": 16, "task_size": 16 << 20, "auto_direct_io_read": True}
    assert "kvikio 26.10.00, 16 threads" in caplog.text
    assert "GPUDirect for device memory" in caplog.text


def test_the_environment_decides(tmp_path: Path, fake: FakeKvikio, monkeypatch) -> None:
    monkeypatch.setenv("KVIKIO_NTHREADS", "3")
    KvikioIo(tmp_path / "file", PAGE).close()
    assert fake.values["num_threads"] == 1
    assert fake.values["task_size"] == io_kvikio.TASK_BYTES


def test_an_older_version_has_fewer_settings(tmp_path: Path, fake: FakeKvikio, caplog) -> None:
    del fake.values["auto_direct_io_read"]
    with caplog.at_level("INFO"):
        KvikioIo(tmp_path / "file", PAGE).close()
    assert "has no setting auto_direct_io_read" in caplog.text


def test_compatibility_mode_is_told(tmp_path: Path, fake: FakeKvikio, caplog) -> None:
    fake.defaults.is_compat_mode_preferred = lambda: True
    with caplog.at_level("INFO"):
        KvikioIo(tmp_path / "file", PAGE).close()
    assert "GPUDirect not available" in caplog.text


def test_kvikio_that_does_not_work_is_an_error(tmp_path: Path, fake: FakeKvikio) -> None:
    class Broken(FakeFile):
        def pread(self, buf: memoryview, size: int, file_offset: int) -> Result:
            raise RuntimeError("KvikIO failure at: x:21: libcuda.so.1: cannot open\nmore")

    fake.CuFile = Broken
    with pytest.raises(ConfigError, match=r"nvme_io='kvikio': kvikio does not work.*libcuda") as e:
        KvikioIo(tmp_path / "file", PAGE)
    assert "use posix" in str(e.value) and "more" not in str(e.value)


def test_without_kvikio_the_error_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(ConfigError, match=r"nvme_io='kvikio'.*kvikio-cu13.*use posix"):
        KvikioIo(tmp_path / "file", PAGE)
    assert not (tmp_path / "file").exists()
