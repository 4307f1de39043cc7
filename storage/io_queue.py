"""Many operations at once on one file: threads, or the engine's own queue.

Small operations are for the kernel's queue (`io_aio.py`), where there is one: a thread for each
operation in flight costs a change of threads, and of the holder of the interpreter lock, per
operation. Of large ones a few keep a device busy, and starting one takes time that is better spent
on checksums: they are for threads.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol, runtime_checkable

from tierkv.storage.io import Completed, IoEngine, IoQueue, Operation, perform

LARGE_BYTES = 512 << 10
"""Operations from this size on are for threads."""


@runtime_checkable
class HasQueue(Protocol):
    """An engine that may have a queue of its own."""

    def open_queue(self, depth: int) -> IoQueue | None:
        """A queue for up to `depth` operations; None if the system has none to give."""
        ...


class ThreadQueue:
    """An `IoQueue` of threads that each wait for one operation.

    Args:
        io: the file.
        threads: as many operations are in flight as it has.
    """

    def __init__(self, io: IoEngine, threads: Executor) -> None:
        self._io, self._threads = io, threads
        self._ended: queue.SimpleQueue[Completed | BaseException] = queue.SimpleQueue()

    def begin(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            self._threads.submit(self._perform, operation)

    def completed(self, at_least: int) -> list[Completed]:
        count = max(at_least, self._ended.qsize())
        ended = [self._ended.get() for _ in range(count)]
        for end in ended:
            if isinstance(end, BaseException):
                raise end
        return [end for end in ended if isinstance(end, tuple)]

    def close(self) -> None:
        """Nothing of its own."""

    def _perform(self, operation: Operation) -> None:
        try:
            self._ended.put(perform(self._io, operation))
        except BaseException as error:  # a bug, which the caller should see
            self._ended.put(error)


def open_queue(io: IoEngine, depth: int, threads: Executor, num_bytes: int) -> IoQueue:
    """A queue for operations of at least `num_bytes`."""
    own = io.open_queue(depth) if num_bytes < LARGE_BYTES and isinstance(io, HasQueue) else None
    return own if own is not None else ThreadQueue(io, threads)
