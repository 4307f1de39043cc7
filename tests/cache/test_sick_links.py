"""A tier below that takes nothing is left alone for a while: it costs no room and no rest."""

from __future__ import annotations

from hand_mover import BLOCK, CPU, GPU, NVME, Bench, Holder

from tierkv.cache.lower_tiers import MoveLimits
from tierkv.types import MoveFailure, MovePriority

LIMITS = MoveLimits(step_bytes=1000, link_bytes=4, room=0.5)


def compute_strangers(bench: Bench, first: int, count: int) -> list[Holder]:
    """Sequences of one block each, that share none."""
    return [bench.compute([first + n] * BLOCK) for n in range(count)]


def full_pool() -> Bench:
    """A pool of 8 idle blocks that nothing below has."""
    bench = Bench(8, cpu=8, admission="write-back", limits=LIMITS)
    for seq in compute_strangers(bench, 0, 8):
        bench.cache.release(seq)
    return bench


def fail_all(bench: Bench) -> int:
    """Let everything in flight fail, and look; returns how much begins again."""
    for move in list(bench.mover.moves):
        bench.mover.end(move, MoveFailure.IO_ERROR)
    return len(bench.run())


def test_blocks_that_could_not_go_down_are_room_again() -> None:
    bench = full_pool()
    assert len(bench.run()) > 0
    assert bench.cache.num_available < 8
    assert fail_all(bench) == 0
    assert bench.cache.num_available == 8


def test_a_tier_that_failed_is_tried_again_after_a_pause() -> None:
    bench = full_pool()
    bench.run()
    fail_all(bench)
    bench.clock.time += 0.9
    assert len(bench.run()) == 0
    bench.clock.time += 0.2
    assert len(bench.run()) > 0


def test_a_long_chain_that_nobody_takes_is_given_up() -> None:
    bench = Bench(8, cpu=8, admission="write-back", limits=MoveLimits(1000, 4, 10.0, 0.0))
    seq = bench.compute(range(8 * BLOCK))
    assert bench.cache.lower is not None
    bench.cache.lower.insist(seq.blocks[-1], CPU)
    assert len(bench.run()) == 4  # the budget of the link; the rest waits
    assert fail_all(bench) == 0
    assert not bench.cache.has_background_work


def test_a_full_tier_takes_new_blocks_when_the_one_below_fails() -> None:
    limits = MoveLimits(1000, 1000, 10.0, 0.0)
    bench = Bench(8, cpu=2, nvme=8, admission="write-through", limits=limits)
    compute_strangers(bench, 0, 2)
    run_with_a_full_disk(bench)
    new = compute_strangers(bench, 2, 2)
    run_with_a_full_disk(bench)
    assert all(CPU in seq.blocks[0].copies for seq in new)


def test_a_child_whose_parent_is_stuck_is_not_sent_again_and_again() -> None:
    limits = MoveLimits(1000, 1000, 10.0, 1.0)
    bench = Bench(4, cpu=4, nvme=8, admission="write-through", limits=limits)
    cache, seq = bench.cache, bench.compute(range(2 * BLOCK))
    parent, child = seq.blocks
    for block in (parent, child):
        cache.moves.begin(block, GPU, CPU, MovePriority.WRITE_BACK)
    cache.lower.clear_offers()
    cache.release(seq)
    first, second = bench.run()
    bench.mover.end(second)  # it has overtaken its parent, and is refused
    assert bench.run() == [first]
    assert child.copies[GPU].is_evictable


def run_with_a_full_disk(bench: Bench) -> None:
    for _ in range(4):
        for move in list(bench.run()):
            is_write = move.destination is NVME
            bench.mover.end(move, MoveFailure.NO_SPACE if is_write else None)
