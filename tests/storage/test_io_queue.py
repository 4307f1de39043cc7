"""Queues of operations: the kernel's and that of threads do the same, and fail the same way."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_blocks import open_nvme, read_back, write_of

from tierkv.storage import io_aio
from tierkv.storage.base import DONE
from tierkv.storage.io import MAX_VECTORS, IoQueue, Operation, address_of, aligned
from tierkv.storage.io_aio import KernelQueue
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.io_queue import LARGE_BYTES, ThreadQueue, open_queue

DEPTH, PAGE, COUNT = 8, 4096, 50
KINDS = ("kernel", "threads")


class Queued:
    """A file of `COUNT` pages and a queue on it."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.io = path, PosixIo(path, COUNT * PAGE)
        self._threads = ThreadPoolExecutor(4)
        own = self.io.open_queue(DEPTH) if kind == "kernel" else None
        if kind == "kernel" and own is None:
            pytest.skip("no asynchronous I/O here")
        self.queue: IoQueue = own or ThreadQueue(self.io, self._threads)

    def all_of(self, operations: list[Operation]) -> dict[int, int | OSError]:
        """Begin all; every one's end."""
        self.queue.begin(operations)
        found: dict[int, int | OSError] = {}
        while len(found) < len(operations):
            found |= dict(self.queue.completed(1))
        return found

    def close(self) -> None:
        self.queue.close()
        self._threads.shutdown()
        self.io.close()


@pytest.fixture(params=KINDS)
def queued(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Queued]:
    made = Queued(tmp_path / "file", request.param)
    yield made
    made.close()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Queued]:
    made = Queued(tmp_path / "file", "kernel")
    yield made
    made.close()


def page(byte: int, count: int = 1) -> memoryview:
    memory = aligned(count * PAGE)
    memory[:] = bytes([byte]) * (count * PAGE)
    return memory


def write(number: int, at: int, buffers: list[memoryview]) -> Operation:
    return Operation(number, True, buffers, at * PAGE, sum(buffer.nbytes for buffer in buffers))


def read(number: int, at: int, buffers: list[memoryview]) -> Operation:
    return write(number, at, buffers)._replace(is_write=False)


def test_bytes_go_where_they_should(queued: Queued) -> None:
    chance = random.Random(0)
    expected = bytearray(COUNT * PAGE)
    for turn in range(20):
        places = chance.sample(range(0, COUNT, 2), DEPTH)
        operations = []
        for number, at in enumerate(places):
            first, second = chance.randrange(256), chance.randrange(256)
            expected[at * PAGE : (at + 2) * PAGE] = bytes([first]) * PAGE + bytes([second]) * PAGE
            operations.append(write(number, at, [page(first), page(second)]))
        assert queued.all_of(operations) == dict.fromkeys(range(DEPTH), 2 * PAGE), turn
        outs = [[aligned(PAGE), aligned(PAGE)] for _ in places]
        reads = [read(n, at, out) for n, (at, out) in enumerate(zip(places, outs, strict=True))]
        assert queued.all_of(reads) == dict.fromkeys(range(DEPTH), 2 * PAGE)
        for at, out in zip(places, outs, strict=True):
            assert b"".join(out) == expected[at * PAGE : (at + 2) * PAGE]
    queued.io.sync()
    assert queued.path.read_bytes() == expected


def test_it_waits_for_as_many_as_are_wanted(queued: Queued) -> None:
    queued.queue.begin([write(number, number, [page(1)]) for number in range(DEPTH)])
    ended = queued.queue.completed(5)
    assert len(ended) >= 5
    while len(ended) < DEPTH:
        ended += queued.queue.completed(1)
    assert sorted(ended) == [(number, PAGE) for number in range(DEPTH)]
    assert queued.queue.completed(0) == []


def test_reading_past_the_end_is_short(queued: Queued) -> None:
    os.truncate(queued.path, 3 * PAGE + 100)
    outs = [[aligned(PAGE), aligned(PAGE)] for _ in range(3)]
    found = queued.all_of([read(n, at, outs[n]) for n, at in enumerate((0, 2, 6))])
    assert found == {0: 2 * PAGE, 1: PAGE + 100, 2: 0}


def test_an_error_is_an_answer(queued: Queued) -> None:
    crooked = aligned(2 * PAGE)[1 : PAGE + 1]
    found = queued.all_of([write(0, 0, [crooked]), write(1, 1, [page(7)])])
    assert isinstance(found[0], OSError)
    assert found[0].errno == errno.EINVAL
    assert found[1] == PAGE


def test_more_buffers_than_one_system_call_takes(queued: Queued) -> None:
    buffers = [page(number % 251) for number in range(MAX_VECTORS + 10)]
    assert queued.all_of([write(0, 0, buffers)]) == {0: len(buffers) * PAGE}
    assert queued.path.read_bytes() == b"".join(buffers)


@pytest.fixture(params=KINDS)
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Queued]:
    """A file on a file system of 1 MiB of which nothing is allocated."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tierkv.storage.io_posix.can_allocate", lambda descriptor: False)
        made = Queued(disk / "file", request.param)
    os.truncate(disk / "file", 4 << 20)
    yield made
    made.close()
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_an_answer(full_disk: Queued) -> None:
    found = full_disk.all_of([write(n, n * 100, [page(1, 100)]) for n in range(DEPTH)])
    errors = [end.errno for end in found.values() if isinstance(end, OSError)]
    assert set(errors) == {errno.ENOSPC}
    assert 0 < len(errors) < DEPTH


# ---------------------------------------------------------------------- the kernel's


@pytest.mark.parametrize("num_taken", [0, 3])
def test_what_the_kernel_does_not_take_is_done_at_once(
    kernel: Queued, monkeypatch: pytest.MonkeyPatch, num_taken: int
) -> None:
    call, calls = io_aio._call, []

    def reluctant(name: str, *arguments: int) -> int:
        if name != "submit":
            return call(name, *arguments)
        calls.append(arguments)
        if len(calls) > 1 or not num_taken:
            raise OSError(errno.EAGAIN, "no room")
        return call(name, arguments[0], num_taken, arguments[2])

    monkeypatch.setattr(io_aio, "_call", reluctant)
    found = kernel.all_of([write(n, n, [page(n + 1)]) for n in range(DEPTH)])
    assert found == dict.fromkeys(range(DEPTH), PAGE)
    assert calls
    kernel.io.sync()
    expected = b"".join(page(n + 1) for n in range(DEPTH))
    assert kernel.path.read_bytes()[: DEPTH * PAGE] == expected


@pytest.mark.parametrize("is_write", [True, False])
def test_what_the_kernel_leaves_half_done_is_finished(
    kernel: Queued, monkeypatch: pytest.MonkeyPatch, is_write: bool
) -> None:
    kernel.io.pwritev([page(5, 3)], 0)
    buffers = [page(9), page(9), page(9)]
    call = io_aio._call

    def lazy(name: str, *arguments: int) -> int:
        count = call(name, *arguments)
        if name == "getevents" and count:  # struct io_event: data, obj, res, res2
            ctypes.c_longlong.from_address(arguments[3] + 16).value = PAGE
        return count

    monkeypatch.setattr(io_aio, "_call", lazy)
    operation = write(0, 0, buffers)._replace(is_write=is_write)
    assert kernel.all_of([operation]) == {0: 3 * PAGE}
    assert b"".join(buffers) == bytes([9 if is_write else 5]) * (3 * PAGE)
    assert kernel.path.read_bytes()[: 3 * PAGE] == b"".join(buffers)


def test_an_interrupted_wait_goes_on(kernel: Queued, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([-1, -1])
    system_call = io_aio._syscall

    def interrupted(number: int, *arguments: object) -> int:
        if next(results, 0) < 0:
            ctypes.set_errno(errno.EINTR)
            return -1
        result: int = system_call(number, *arguments)
        return result

    monkeypatch.setattr(io_aio, "_syscall", interrupted)
    assert kernel.all_of([write(0, 0, [page(1)])]) == {0: PAGE}


def test_a_queue_that_was_given_back_is_used_again(tmp_path: Path) -> None:
    """Destroying one takes the kernel long."""
    first = Queued(tmp_path / "a", "kernel")
    assert isinstance(first.queue, KernelQueue)
    context = first.queue._context
    first.close()
    again = Queued(tmp_path / "b", "kernel")
    assert isinstance(again.queue, KernelQueue)
    assert again.queue._context == context
    assert again.all_of([write(0, 0, [page(1)])]) == {0: PAGE}
    again.close()


def test_a_fork_has_queues_of_its_own(tmp_path: Path) -> None:
    Queued(tmp_path / "a", "kernel").close()
    child = os.fork()
    if child == 0:
        try:
            again = Queued(tmp_path / "b", "kernel")
            is_right = again.all_of([write(0, 0, [page(1)])]) == {0: PAGE}
            os._exit(0 if is_right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("reason", ["machine", "system", "buffered"])
def test_without_one_threads_do_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def refuse(name: str, *arguments: int) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    io_aio._unused.clear()
    if reason == "machine":
        monkeypatch.setattr(io_aio.platform, "machine", lambda: "unknown")
    elif reason == "system":
        monkeypatch.setattr(io_aio, "_call", refuse)
    with ThreadPoolExecutor(2) as threads:
        io = PosixIo(tmp_path / "file", PAGE, direct=reason != "buffered")
        assert isinstance(open_queue(io, DEPTH, threads, PAGE), ThreadQueue)
        io.close()
    store = open_nvme(tmp_path / "store")
    assert store.write([write_of(n, n) for n in range(16)]) == [DONE] * 16
    assert read_back(store, 7, 7)[0] == DONE
    store.close()


def test_large_operations_are_for_threads(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        io = PosixIo(tmp_path / "file", PAGE)
        small = open_queue(io, DEPTH, threads, LARGE_BYTES - PAGE)
        large = open_queue(io, DEPTH, threads, LARGE_BYTES)
        assert (type(small), type(large)) == (KernelQueue, ThreadQueue)
        small.close()
        io.close()


def test_a_bug_in_a_thread_is_seen() -> None:
    class Broken:
        is_direct = False

        def preadv(self, buffers: object, offset: int) -> int:
            raise ZeroDivisionError

    with ThreadPoolExecutor(1) as threads:
        queue = ThreadQueue(Broken(), threads)  # type: ignore[arg-type]
        queue.begin([read(0, 0, [page(1)])])
        with pytest.raises(ZeroDivisionError):
            queue.completed(1)


def test_addresses() -> None:
    memory = aligned(2 * PAGE)
    assert address_of(memory[PAGE:]) == address_of(memory) + PAGE
    fixed = memoryview(bytes(100))
    assert address_of(fixed[10:]) == address_of(fixed) + 10
