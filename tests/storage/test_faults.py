"""The fakes do what they promise, the same for the same seed."""

from __future__ import annotations

import pytest
from store_blocks import PAYLOAD_BYTES, cause, key_of, payload_of, read_back, write_of

from tierkv.storage.base import DONE, Cause
from tierkv.storage.faults import Fault, FaultPlan, FaultyStore
from tierkv.storage.mem_store import MemStore


def store_with(plan: FaultPlan) -> FaultyStore:
    return FaultyStore(MemStore(8, PAYLOAD_BYTES), plan)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.ERROR, Cause.IO_ERROR),
        (Fault.SHORT_READ, Cause.SHORT_READ),
        (Fault.BIT_FLIP, Cause.CORRUPT),
        (Fault.STALL, Cause.LATE),
    ],
)
def test_scripted_reads(fault: Fault, expected: Cause) -> None:
    store = store_with(FaultPlan({1: fault}))
    assert store.write([write_of(0, 0)]) == [DONE]
    outcome, payload = read_back(store, 0, 0)
    assert cause(outcome) is expected
    assert payload != payload_of(0)
    assert read_back(store, 0, 0) == (DONE, payload_of(0))


@pytest.mark.parametrize(
    ("fault", "expected"), [(Fault.ERROR, Cause.IO_ERROR), (Fault.NO_SPACE, Cause.NO_SPACE)]
)
def test_scripted_writes(fault: Fault, expected: Cause) -> None:
    store = store_with(FaultPlan({1: fault}))
    first, second = store.write([write_of(0, 0), write_of(1, 1)])
    assert (first, cause(second)) == (DONE, expected)
    assert cause(read_back(store, 1, 1)[0]) is Cause.NOT_FOUND
    assert [block.key for block in store.recover()] == [key_of(0)]
    assert store.write([write_of(1, 1)]) == [DONE]
    assert read_back(store, 1, 1) == (DONE, payload_of(1))


def test_a_torn_write_is_noticed_when_it_is_read() -> None:
    store = store_with(FaultPlan({0: Fault.TORN_WRITE}))
    assert store.write([write_of(0, 0)]) == [DONE]
    assert cause(read_back(store, 0, 0)[0]) is Cause.CORRUPT


def test_a_stall_takes_its_time() -> None:
    slept: list[float] = []
    plan = FaultPlan({0: Fault.STALL}, stall_s=3.0, sleep=slept.append)
    assert cause(store_with(plan).write([write_of(0, 0)])[0]) is Cause.LATE
    assert slept == [3.0]


def test_equal_seeds_are_equal_histories() -> None:
    def history(seed: int) -> list[Cause | None]:
        store = store_with(FaultPlan(rates={Fault.ERROR: 0.2, Fault.BIT_FLIP: 0.2}, seed=seed))
        store._inner.write([write_of(0, 0)])
        return [cause(read_back(store, 0, 0)[0]) for _ in range(200)]

    assert history(1) == history(1) != history(2)
    assert {*history(1)} == {None, Cause.IO_ERROR, Cause.CORRUPT}
