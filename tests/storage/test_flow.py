"""Many operations of one call in flight: bounds, and what happens after a bug."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tierkv.storage.flow import DEPTH, IN_FLIGHT_BYTES, Flow
from tierkv.storage.io import Completed, Operation
from tierkv.storage.record import HEADER_BYTES


class HandQueue:
    """An `IoQueue` whose operations end in random order, some at a time."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)
        self.in_flight: dict[int, Operation] = {}
        self.most = self.most_bytes = self.num_begun = 0

    def begin(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            assert operation.number not in self.in_flight
            self.in_flight[operation.number] = operation
        self.num_begun += len(operations)
        self.most = max(self.most, len(self.in_flight))
        size = sum(operation.num_bytes for operation in self.in_flight.values())
        self.most_bytes = max(self.most_bytes, size)

    def completed(self, at_least: int) -> list[Completed]:
        assert 1 <= at_least <= len(self.in_flight), "it would wait for ever"
        count = self._chance.randint(at_least, len(self.in_flight))
        numbers = self._chance.sample(sorted(self.in_flight), count)
        return [(number, self.in_flight.pop(number).num_bytes) for number in numbers]

    def close(self) -> None:
        assert not self.in_flight


class Work:
    """A `Job`; `fails` says in which of its methods."""

    def __init__(self, num_bytes: int, log: list[int], fails: str = "") -> None:
        self._num_bytes, self._log, self._fails = num_bytes, log, fails
        self._headers: list[memoryview] = []

    def start(self, number: int, headers: list[memoryview]) -> Operation:
        if self._fails == "start":
            raise ZeroDivisionError
        self._headers = headers
        for header in headers:
            assert header.nbytes == HEADER_BYTES
            header[:1] = bytes([number])
        self._number = number
        return Operation(number, True, headers, 0, self._num_bytes)

    def end(self, moved: int | OSError) -> None:
        assert moved == self._num_bytes
        assert {header[0] for header in self._headers} == {self._number}, "used by another one"
        self._log.append(self._number)
        if self._fails == "end":
            raise ZeroDivisionError


@pytest.mark.parametrize("num_bytes", [8192, 36 << 10, 1 << 20, 64 << 20])
@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_all_jobs_are_done_within_the_bounds(num_bytes: int, count: int) -> None:
    queue, log = HandQueue(), []
    flow = Flow(queue, num_headers=3)
    flow.run(Work(num_bytes, log) for _ in range(count))
    assert len(log) == count == queue.num_begun
    assert queue.most <= DEPTH
    assert queue.most_bytes < IN_FLIGHT_BYTES + num_bytes
    if count == 500:
        assert queue.most == DEPTH or queue.most_bytes >= IN_FLIGHT_BYTES, "it keeps them busy"
    flow.close()


@pytest.mark.parametrize("fails", ["start", "end"])
@pytest.mark.parametrize("place", [0, 20, 99])
def test_after_a_bug_nothing_is_in_flight(fails: str, place: int) -> None:
    """Or the device would write into memory that belongs to somebody else by then."""
    queue, log = HandQueue(place), []
    flow = Flow(queue, num_headers=1)
    with pytest.raises(ZeroDivisionError):
        flow.run(Work(36 << 10, log, fails if n == place else "") for n in range(100))
    assert not queue.in_flight
