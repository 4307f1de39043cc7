"""Many operations of one call in flight, each with memory for the headers of its slots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tierkv.storage.io import IoQueue, Operation, aligned
from tierkv.storage.record import HEADER_BYTES

DEPTH = 32
"""Operations of one call in flight."""

IN_FLIGHT_BYTES = 8 << 20
"""No more is begun while so much is in flight: another call's operations would be behind it."""

_BEGIN_BYTES = 256 << 10
"""Operations are handed over together up to this size."""


class Job(Protocol):
    """What one operation is for."""

    def start(self, number: int, headers: list[memoryview]) -> Operation:
        """The operation, with this number; `headers` are 4 KiB each, aligned, its own until the
        end, and hold anything."""
        ...

    def end(self, moved: int | OSError) -> None:
        """What became of it."""
        ...


class Flow:
    """A queue and the memory for headers; for one call at a time.

    Args:
        queue: of `DEPTH` operations.
        num_headers: for each operation.
    """

    def __init__(self, queue: IoQueue, num_headers: int) -> None:
        self._queue = queue
        memory = aligned(DEPTH * num_headers * HEADER_BYTES)
        starts = range(0, memory.nbytes, HEADER_BYTES)
        headers = [memory[start : start + HEADER_BYTES] for start in starts]
        self._headers = [headers[n * num_headers :][:num_headers] for n in range(DEPTH)]
        self._free = list(range(DEPTH))
        self._waiting: list[tuple[Job, Operation]] = []
        self._waiting_bytes = 0
        self._in_flight: dict[int, tuple[Job, Operation]] = {}
        self._num_bytes = 0

    def run(self, jobs: Iterable[Job]) -> None:
        """Do all jobs. Each is started and ended on this thread, while others are in flight.

        After an exception, a bug in a job, the flow cannot be used again.
        """
        try:
            for job in jobs:
                while not self._free or self._num_bytes >= IN_FLIGHT_BYTES:
                    self._begin()
                    self._end_some()
                self._start(job)
            self._begin()
            while self._in_flight:
                self._end_some()
        finally:
            while self._in_flight:  # after a bug: no device may write into memory given back
                self._ended()

    def close(self) -> None:
        """Give the queue back."""
        self._queue.close()

    def _start(self, job: Job) -> None:
        number = self._free.pop()
        operation = job.start(number, self._headers[number])
        self._num_bytes += operation.num_bytes
        self._waiting.append((job, operation))
        self._waiting_bytes += operation.num_bytes
        if self._waiting_bytes >= _BEGIN_BYTES:
            self._begin()

    def _begin(self) -> None:
        if self._waiting:
            self._queue.begin([operation for _, operation in self._waiting])
            self._in_flight |= {item[1].number: item for item in self._waiting}
            self._waiting, self._waiting_bytes = [], 0

    def _end_some(self) -> None:
        for job, moved in self._ended():
            job.end(moved)

    def _ended(self) -> list[tuple[Job, int | OSError]]:
        """Wait for a part of what is in flight: fewer waits cost less than a full queue gains."""
        found = []
        for number, moved in self._queue.completed(max(1, len(self._in_flight) // 4)):
            job, operation = self._in_flight.pop(number)
            self._free.append(number)
            self._num_bytes -= operation.num_bytes
            found.append((job, moved))
        return found
