"""Between a mover and its store: staging what leaves the pool, erasing, noting uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
from ledger import ManualClock
from mover_worlds import (
    CPU,
    EVEN,
    EXPECTED,
    GPU,
    NVME,
    ODD,
    PATIENCE_S,
    AnsweringStore,
    LedgerWorld,
    ThreadWorld,
    World,
    block_the_link,
    finish,
    mem,
    move,
    raising,
)

from tierkv.cache.layout import KVLayout
from tierkv.protocols import Mover
from tierkv.storage.base import Cause, Failure
from tierkv.storage.quarantine import QuarantinedStore, QuarantineLimits
from tierkv.types import Erasure, MoveFailure

# ---------------------------------------------------------------------- erasing


def erasures(mover: Mover, count: int) -> list[Erasure]:
    """The next `count` of them."""
    found: list[Erasure] = []
    end = time.monotonic() + PATIENCE_S
    while len(found) < count:
        mover.wait(1.0)
        found += mover.poll_erased()
        assert time.monotonic() < end, f"{len(found)} of {count} slots were erased"
    return found


@pytest.mark.parametrize("make", [lambda: ThreadWorld(EVEN, mem()), lambda: LedgerWorld(False)])
def test_the_end_of_an_erasure_is_told(make: Callable[[], World]) -> None:
    world = make()
    world.mover.erase([3, 1, 3])
    assert {(e.slot, e.failure) for e in erasures(world.mover, 2)} == {(1, None), (3, None)}
    world.close()


@pytest.mark.parametrize("cause", Cause)
def test_an_erasure_that_failed_says_why(cause: Cause, worlds) -> None:
    world = worlds(EVEN, AnsweringStore(mem(), lambda: Failure(cause, "injected")))
    world.mover.erase([2, 5])
    assert erasures(world.mover, 2) == [Erasure(s, EXPECTED[cause]) for s in (2, 5)]


def test_an_os_error_while_erasing_is_a_failure(worlds) -> None:
    world = worlds(EVEN, AnsweringStore(mem(), partial(raising, OSError("no device"))))
    for _ in range(2):  # the thread lives on
        world.mover.erase([2])
        assert erasures(world.mover, 1) == [Erasure(2, MoveFailure.IO_ERROR)]


# ---------------------------------------------------------------------- what else a store is told


def test_uses_and_quarantine_go_through_to_the_store(worlds) -> None:
    clock = ManualClock()
    sick = AnsweringStore(mem(), lambda: Failure(Cause.IO_ERROR))
    guard = QuarantinedStore(sick, clock.now, QuarantineLimits(threshold=1))
    world = worlds(EVEN, guard)
    assert not world.mover.is_quarantined(is_read=True)
    world.mover.begin([move(1, 1, (NVME, 0), (GPU, 0))])
    finish(world.mover, 1)
    assert world.mover.is_quarantined(is_read=True)
    assert not world.mover.is_quarantined(is_read=False)
    assert not worlds(EVEN, mem()).mover.is_quarantined(is_read=True)

    store = mem()
    world = worlds(EVEN, store)
    world.fill(NVME, 4, 4)
    world.mover.touch([4, 7])
    assert [(b.slot, b.hits) for b in store.recover()] == [(4, 1)]


# ---------------------------------------------------------------------- staging


def released(mover: Mover, count: int) -> list[int]:
    """The next `count` tickets."""
    found: list[int] = []
    end = time.monotonic() + PATIENCE_S
    while len(found) < count:
        mover.wait(1.0)
        found += mover.poll_released()
        assert time.monotonic() < end, f"{len(found)} of {count} sources were released"
    return found


@pytest.mark.parametrize("layout", [EVEN, ODD])
def test_a_write_that_hangs_keeps_nothing_in_the_pool(layout: KVLayout, gated) -> None:
    world = gated(layout)
    for number in range(6):
        world.fill(GPU, number, number)
    world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in range(6)])
    assert sorted(released(world.mover, 6)) == list(range(6))
    assert world.mover.poll() == []
    for number in range(6):
        world.fill(GPU, number, 20 + number)
    world.store.opened.set()
    assert all(result.failure is None for result in finish(world.mover, 6))
    assert all(world.holds(NVME, n, n) for n in range(6))


def test_staging_memory_is_bounded(gated) -> None:
    """What finds no room keeps its source until there is some."""
    world = gated(staging_bytes=3 * EVEN.block_bytes, write_bytes=2 * EVEN.block_bytes)
    world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in range(7)])
    assert released(world.mover, 2) == [0, 1]
    world.mover.wait(0.1)
    assert world.mover.poll_released() == []
    world.store.opened.set()
    assert len(finish(world.mover, 7)) == 7
    world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in range(7)])
    assert len(finish(world.mover, 7)) == 7, "the room came back"


def test_a_result_comes_after_its_release_or_without_it(worlds) -> None:
    world = worlds(EVEN, mem())
    for _ in range(200):
        world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in range(4)])
        ended: set[int] = set()
        while len(ended) < 4:
            world.mover.wait(1.0)
            ended |= {result.ticket for result in world.mover.poll()}
            assert not ended & set(world.mover.poll_released())


def test_only_the_pool_is_released(gated) -> None:
    world = gated()
    world.mover.begin([move(n, n, (CPU, n), (NVME, n)) for n in range(4)])
    world.mover.wait(0.1)
    assert world.mover.poll_released() == []
    world.store.opened.set()
    finish(world.mover, 4)
    assert world.mover.poll_released() == []


def test_writes_keep_their_order_wherever_they_come_from(gated) -> None:
    """A parent in the pool goes before its child in the arena, and the other way round."""
    world = gated(write_bytes=1)
    world.mover.begin([move(n, n, ((GPU, CPU)[n % 2], n), (NVME, n)) for n in range(8)])
    world.store.opened.set()
    finish(world.mover, 8)
    assert world.store.batches == [[n] for n in range(8)]


# ---------------------------------------------------------------------- giving up


@pytest.mark.parametrize("layout", [EVEN, ODD])
def test_a_load_that_was_abandoned_leaves_the_pool_alone(layout: KVLayout, gated) -> None:
    """Whether it is being read or waits for that."""
    world = gated(layout, num_readers=1, read_bytes=2 * layout.slot_bytes)
    world.store.opened.set()
    for number in range(6):
        world.fill(NVME, number, number)
    world.store.close_gate()
    world.mover.begin([move(n, n, (NVME, n), (GPU, n)) for n in range(6)])
    assert world.store.entered.wait(PATIENCE_S)
    world.mover.abandon([1, 2, 5])
    assert sorted(released(world.mover, 3)) == [1, 2, 5]
    for number in (1, 2, 5):
        world.fill(GPU, number, 20 + number)
    world.store.opened.set()
    failures = {result.ticket: result.failure for result in finish(world.mover, 6)}
    late = dict.fromkeys((1, 2, 5), MoveFailure.LATE)
    assert failures == {**dict.fromkeys((0, 3, 4), None), **late}
    assert all(world.holds(GPU, n, n) for n in (0, 3, 4))
    assert all(world.holds(GPU, n, 20 + n) for n in (1, 2, 5))
    assert world.store.batches == [[0, 1], [3], [4]], "what waits and is not wanted is not read"


def test_what_has_ended_or_goes_elsewhere_cannot_be_abandoned(gated) -> None:
    world = gated()
    world.store.opened.set()
    world.fill(NVME, 0, 0)
    world.mover.begin([move(1, 0, (NVME, 0), (GPU, 0))])
    finish(world.mover, 1)
    world.mover.abandon([1, 99])
    world.store.close_gate()
    world.mover.begin([move(2, 0, (NVME, 0), (CPU, 0)), move(3, 0, (GPU, 1), (CPU, 1))])
    world.mover.abandon([2, 3])
    assert world.mover.poll_released() == []
    world.store.opened.set()
    assert {result.failure for result in finish(world.mover, 2)} == {None}


# ---------------------------------------------------------------------- the end


def test_closing_ends_a_wait_for_staging_memory(gated) -> None:
    world = gated(staging_bytes=1, close_timeout_s=0.1)
    world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in range(4)])
    released(world.mover, 1)
    world.mover.close()
    failures = {result.ticket: result.failure for result in world.mover.poll()}
    assert failures == dict.fromkeys((1, 2, 3), MoveFailure.UNAVAILABLE)


def test_closing_reports_erasures_that_never_happened(gated) -> None:
    world = gated(close_timeout_s=0.1)
    block_the_link(world, is_read=False)
    world.mover.erase([8, 9])
    world.mover.close()
    assert world.mover.poll_erased() == [Erasure(s, MoveFailure.UNAVAILABLE) for s in (8, 9)]
