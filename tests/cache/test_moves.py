"""Moves whose ends the test decides: order, and what the mover releases before the end."""

from __future__ import annotations

import pytest
from hand_mover import CPU, GPU, NVME, Bench, Holder

from tierkv.cache.check import check_cache
from tierkv.cache.lower_tiers import MoveLimits
from tierkv.types import MoveFailure, MovePriority

SWAP, WRITE = MovePriority.SWAP_OUT, MovePriority.WRITE_BACK


@pytest.mark.parametrize("tiers", [{"cpu": 20}, {"nvme": 20}])
def test_a_child_does_not_overtake_its_parent(tiers: dict[str, int]) -> None:
    """Parents wait as write-backs when the sequence is swapped out: its last blocks follow them."""
    bench = Bench(**tiers, limits=MoveLimits(step_bytes=2, link_bytes=1000, room=0.0))
    seq = bench.compute(range(17))
    assert [move.priority for move in bench.run()] == [WRITE, WRITE]
    bench.cache.swap_out(seq)
    bench.cache.lower.clear_offers()
    moves = [m for m in bench.run() if m.tokens]
    assert [move.priority for move in moves] == [WRITE] * 4
    assert [move.parent for move in moves[1:]] == [move.key for move in moves[:-1]]
    bench.mover.end_all()
    bench.settle()
    (below,) = bench.cache.lower.specs
    assert sum(below in block.copies for block in bench.cache.tree) == 4, "none was refused"
    check_cache(bench.cache, [])


def test_where_no_parent_waits_a_swap_is_urgent() -> None:
    bench = Bench(nvme=20, admission="second-hit")
    seq = bench.compute(range(17))
    bench.run()
    bench.cache.swap_out(seq)
    assert {move.priority for move in bench.run()} == {SWAP}


def test_a_released_source_may_leave_the_pool_before_the_move_ends() -> None:
    bench = Bench(pool=8, nvme=20)
    bench.cache.release(bench.compute(range(16)))
    moves = bench.run()
    assert len(moves) == 4 and bench.cache.num_available == 4
    for move in moves:
        bench.mover.release(move)
    bench.cache.poll()
    check_cache(bench.cache, [])
    assert bench.cache.num_available == 8 and bench.cache.num_leaving == 0
    other = bench.compute(range(100, 132))
    bench.cache.release(other)
    bench.mover.end_all()
    bench.settle()
    check_cache(bench.cache, [])
    again = bench.sequence(range(17))
    assert len(bench.cache.lookup(again).blocks) == 4, "its bytes had been copied"


def test_when_a_released_move_fails_the_block_is_computed_again() -> None:
    bench = Bench(pool=4, nvme=20)
    bench.cache.release(bench.compute(range(16)))
    for move in list(bench.run()):
        bench.mover.release(move)
    bench.cache.poll()
    bench.cache.release(bench.compute(range(100, 116)))  # takes the whole pool
    for move in list(bench.mover.moves):
        bench.mover.end(move, MoveFailure.IO_ERROR)
    bench.cache.poll()
    check_cache(bench.cache, [])
    assert not bench.cache.lookup(bench.sequence(range(17))).blocks
    assert bench.cache.residency.tiers[NVME].num_empty == 20


def test_a_block_that_is_computed_again_while_its_copy_is_on_its_way_down() -> None:
    bench = Bench(pool=4, nvme=20)
    bench.cache.release(bench.compute(range(16)))
    for move in list(bench.run()):
        bench.mover.release(move)
    bench.cache.poll()
    bench.cache.release(bench.compute(range(100, 116)))
    seq = bench.compute(range(16))
    check_cache(bench.cache, [seq])
    bench.mover.end_all()
    bench.cache.poll()
    check_cache(bench.cache, [seq])
    assert all({GPU, NVME} <= b.copies.keys() for b in seq.blocks if b is not None)
    bench.cache.release(seq)


def test_a_released_tail_gives_its_place_back_and_comes_back_once_it_has_arrived() -> None:
    bench = Bench(pool=8, nvme=20)
    seq = bench.compute(range(18))
    bench.settle()
    bench.cache.swap_out(seq)
    (move,) = bench.run()
    assert not move.tokens and bench.cache.swapper.is_under_way(seq)
    bench.mover.release(move)
    bench.cache.poll()
    assert not bench.cache.swapper.is_under_way(seq)
    assert bench.cache.num_available == 8
    bench.mover.end_all()
    bench.cache.poll()
    bench.admit(seq)
    assert seq.load_tokens == 18 and seq.num_loading == 1


def test_nobody_waits_for_a_tail_that_does_not_arrive() -> None:
    bench = Bench(pool=8, nvme=20)
    seq = bench.compute(range(18))
    bench.settle()
    bench.cache.swap_out(seq)
    (move,) = bench.run()
    bench.mover.release(move)
    bench.cache.poll()
    bench.admit(seq)
    assert seq.num_loading == 0 and seq.num_computed == 16, "its last two tokens are computed again"
    check_cache(bench.cache, [seq])
    bench.mover.end(move)
    bench.cache.poll()
    check_cache(bench.cache, [seq])
    assert not bench.cache.tails.blocks


def test_a_link_that_is_far_behind_takes_no_tail() -> None:
    bench = Bench(nvme=20, limits=MoveLimits(step_bytes=1000, link_bytes=3, room=0.0))
    seq = bench.compute(range(18))
    assert len(bench.run()) == 3
    bench.cache.swap_out(seq)
    assert seq.tail is None
    check_cache(bench.cache, [])


def loading(bench: Bench) -> Holder:
    """A sequence that waits for four blocks from the store."""
    bench.cache.release(bench.compute(range(16)))
    bench.settle()
    bench.cache.release(bench.compute(range(100, 132)))
    bench.settle()
    seq = bench.sequence(range(17))
    bench.admit(seq)
    assert seq.num_loading == 4
    return seq


def test_a_late_load_is_abandoned_and_gives_its_slot_back_when_it_is_released() -> None:
    bench = Bench(pool=8, nvme=20)
    seq = loading(bench)
    moves = list(bench.run())
    bench.clock.time += 100
    bench.run()
    assert seq.num_loading == 0 and bench.mover.abandoned == [move.ticket for move in moves]
    assert bench.cache.num_available == 4, "late bytes may still land"
    for move in moves[:3]:
        bench.mover.release(move)
    bench.run()
    check_cache(bench.cache, [seq])
    assert bench.cache.num_available == 7
    assert NVME in bench.cache.moves.stalled, "the disk has not answered"
    for move in moves:
        bench.mover.end(move, MoveFailure.LATE)
    bench.run()
    check_cache(bench.cache, [seq])
    assert bench.cache.num_available == 8 and not bench.cache.moves.stalled


def test_a_late_load_that_lands_gives_its_slot_back_then() -> None:
    bench = Bench(pool=8, nvme=20)
    seq = loading(bench)
    bench.run()
    bench.clock.time += 100
    bench.run()
    bench.mover.end_all()
    bench.run()
    check_cache(bench.cache, [seq])
    assert bench.cache.num_available == 8 and not bench.cache.moves.stalled


def test_an_arena_keeps_its_source() -> None:
    bench = Bench(cpu=10, nvme=20)
    bench.cache.release(bench.compute(range(16)))
    bench.run()
    bench.mover.end_all()
    assert {move.source for move in bench.run()} == {CPU}
    check_cache(bench.cache, [])
