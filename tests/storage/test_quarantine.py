"""A sick tier is left alone, probed, and taken back."""

from __future__ import annotations

from store_blocks import PAYLOAD_BYTES, cause, read_back, write_of

from tierkv.storage.base import DONE, Cause
from tierkv.storage.faults import Fault, FaultPlan, FaultyStore
from tierkv.storage.mem_store import MemStore
from tierkv.storage.quarantine import QuarantinedStore, QuarantineLimits


class Bench:
    """A quarantined store on a device whose faults are scripted, and a clock set by hand."""

    def __init__(self, script: dict[int, Fault], stall_s: float = 0.0) -> None:
        self.now = 100.0
        self.plan = FaultPlan(script, stall_s=stall_s, sleep=self.pass_time)
        device = FaultyStore(MemStore(8, PAYLOAD_BYTES), self.plan)
        limits = QuarantineLimits(threshold=2, first_pause_s=1.0, max_pause_s=3.0, slow_s=5.0)
        self.store = QuarantinedStore(device, lambda: self.now, limits)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def read(self, number: int = 0) -> Cause | None:
        return cause(read_back(self.store, 0, number)[0])

    def write(self) -> Cause | None:
        return cause(self.store.write([write_of(0, 0)])[0])


def test_it_is_left_alone_and_comes_back() -> None:
    bench = Bench({1: Fault.ERROR, 2: Fault.ERROR})
    assert bench.write() is None
    assert [bench.read() for _ in range(4)] == [
        *[Cause.IO_ERROR] * 2,
        *[Cause.QUARANTINED] * 2,
    ]
    assert bench.store.reads.is_quarantined
    assert bench.plan.injected[Fault.ERROR] == 2
    bench.pass_time(1.0)
    assert [bench.read() for _ in range(2)] == [None, None]
    assert not bench.store.reads.is_quarantined


def test_a_success_in_between_resets_the_count() -> None:
    bench = Bench({1: Fault.ERROR, 3: Fault.ERROR})
    bench.write()
    assert [bench.read() for _ in range(4)] == [Cause.IO_ERROR, None, Cause.IO_ERROR, None]


def test_failed_probes_double_the_pause_up_to_its_bound() -> None:
    bench = Bench(dict.fromkeys(range(1, 20), Fault.ERROR))
    bench.write()
    bench.read(), bench.read()
    for pause in (1.0, 2.0, 3.0, 3.0):
        bench.pass_time(pause - 0.1)
        assert bench.read() is Cause.QUARANTINED
        bench.pass_time(0.2)
        assert bench.read() is Cause.IO_ERROR


def test_only_one_call_probes() -> None:
    bench = Bench({1: Fault.ERROR, 2: Fault.ERROR, 3: Fault.STALL}, stall_s=2.0)
    bench.write()
    bench.read(), bench.read()
    bench.pass_time(1.0)
    during: list[Cause | None] = []
    bench.plan._sleep = lambda seconds: during.append(bench.read())
    assert bench.read() is Cause.LATE
    assert during == [Cause.QUARANTINED]


def test_reads_and_writes_are_judged_separately() -> None:
    bench = Bench({1: Fault.NO_SPACE, 2: Fault.NO_SPACE})
    bench.write()
    assert [bench.write() for _ in range(3)] == [*[Cause.NO_SPACE] * 2, Cause.QUARANTINED]
    assert bench.store.writes.is_quarantined and not bench.store.reads.is_quarantined
    assert bench.store.erase([0]) == [DONE]


def test_a_miss_proves_nothing() -> None:
    bench = Bench({1: Fault.ERROR, 2: Fault.ERROR})
    bench.write()
    bench.read(), bench.read()
    bench.pass_time(1.0)
    assert bench.read(number=5) is Cause.NOT_FOUND
    assert bench.store.reads.is_quarantined


def test_a_slow_call_counts_as_failed_but_its_answer_stands() -> None:
    bench = Bench({})
    bench.write()
    inner_read = bench.store._inner.read

    def slow_read(batch):  # type: ignore[no-untyped-def]
        bench.pass_time(6.0)
        return inner_read(batch)

    bench.store._inner.read = slow_read  # type: ignore[method-assign]
    assert [bench.read() for _ in range(3)] == [None, None, Cause.QUARANTINED]
