"""Forgetting what a persistent tier holds: until the device has confirmed it, it is open."""

from __future__ import annotations

import pytest
from hand_mover import NVME, Bench

from tierkv.cache.erasures import Erasures
from tierkv.cache.recovery import forget_all
from tierkv.types import MoveFailure

IO_ERROR = MoveFailure.IO_ERROR


@pytest.fixture
def bench() -> Bench:
    """Four blocks are stored, and in the pool; nobody uses them."""
    made = Bench(nvme=6)
    made.cache.release(made.compute(range(16)))
    made.settle()
    return made


def erasures(bench: Bench) -> Erasures:
    moves = bench.cache.moves
    assert moves is not None and moves.erasures is not None
    return moves.erasures


def test_forgetting_is_open_until_it_is_confirmed(bench: Bench) -> None:
    assert forget_all(bench.cache)
    assert sorted(bench.mover.erasing) == [0, 1, 2, 3]
    assert (erasures(bench).num_begun, erasures(bench).num_open) == (4, 4)
    assert erasures(bench).failure() == "4 blocks are not erased yet"
    assert bench.cache.has_background_work
    bench.mover.end_erasing()
    bench.run()
    assert erasures(bench).num_open == 0 and erasures(bench).failure() is None
    assert not bench.cache.has_background_work


def test_what_failed_is_tried_again_with_longer_and_longer_pauses(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    forget_all(bench.cache)
    bench.mover.end_erasing(IO_ERROR)
    bench.run()
    assert "erasing stored blocks failed (io_error)" in caplog.text
    assert (erasures(bench).num_failures, erasures(bench).num_open) == (4, 4)
    assert erasures(bench).failure() == "4 blocks could not be erased (io_error)"
    assert not bench.cache.has_background_work
    waited = []
    for _ in range(9):
        start = bench.clock.time
        while not bench.mover.erasing:
            bench.clock.time += 0.5
            bench.run()
        waited.append(bench.clock.time - start)
        bench.run()
        bench.mover.end_erasing(IO_ERROR)
        bench.run()
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert erasures(bench).num_failures == 40
    bench.clock.time += 60
    bench.run()
    bench.mover.end_erasing()
    bench.run()
    assert erasures(bench).num_open == 0
    assert caplog.text.count("erasing stored blocks failed") == 1


def test_forgetting_again_tries_again_at_once(bench: Bench) -> None:
    forget_all(bench.cache)
    bench.mover.end_erasing(IO_ERROR)
    bench.run()
    assert forget_all(bench.cache)
    assert sorted(bench.mover.erasing) == [0, 1, 2, 3]


def test_a_slot_that_is_used_again_is_left_alone_and_settled_by_the_write(bench: Bench) -> None:
    forget_all(bench.cache)
    bench.mover.end_erasing(IO_ERROR)
    bench.run()
    bench.cache.release(bench.compute(range(100, 108)))
    (first, second) = bench.run()
    bench.clock.time += 5
    bench.run()
    used = {first.destination_slot, second.destination_slot}
    assert set(bench.mover.erasing) == {0, 1, 2, 3} - used
    bench.mover.end_erasing()
    bench.mover.end(first)
    bench.run()
    assert erasures(bench).num_open == 1
    bench.mover.end(second, IO_ERROR)  # what had been there may be there still
    bench.run()
    assert erasures(bench).num_open == 1
    bench.clock.time += 60
    bench.run()
    assert bench.mover.erasing == [second.destination_slot]
    bench.mover.end_erasing()
    bench.run()
    assert erasures(bench).num_open == 0


def test_an_erasure_that_fails_just_before_a_write_succeeds_is_settled(bench: Bench) -> None:
    forget_all(bench.cache)
    bench.cache.release(bench.compute(range(100, 116)))
    bench.run()
    bench.mover.end_erasing(IO_ERROR)
    bench.mover.end_all()
    bench.run()
    assert (erasures(bench).num_failures, erasures(bench).num_open) == (4, 0)


def test_bytes_of_blocks_that_were_dropped_before_go_too(bench: Bench) -> None:
    """Evicted for a write that then failed; arrived too late for its parent; a private tail."""
    bench.cache.release(bench.compute(range(100, 116)))
    bench.run()
    assert bench.cache.evictors[NVME].num_evicted == 2
    for move in list(bench.mover.moves):
        bench.mover.end(move, IO_ERROR)
    bench.settle()
    bench.mover.moves.clear()
    assert forget_all(bench.cache)
    assert sorted(bench.mover.erasing) == [0, 1, 2, 3, 4, 5]
    bench.mover.end_erasing()
    bench.run()
    assert forget_all(bench.cache)
    assert bench.mover.erasing == [], "nothing is left to erase"


def test_a_tail_is_forgotten_with_the_rest(bench: Bench) -> None:
    seq = bench.compute(range(18))
    bench.cache.swap_out(seq)
    (tail,) = bench.run()
    bench.settle()
    bench.cache.release(seq)
    assert forget_all(bench.cache)
    assert tail.destination_slot in bench.mover.erasing
