"""What became of prefetched blocks, how long waits took, and which stored blocks were used."""

from __future__ import annotations

import random

import pytest
from hand_mover import CPU, GPU, NVME, Bench
from histories import Run
from ledger import VOCAB

from tierkv.cache.tiered_cache import TieredCache
from tierkv.policies.base import AccessHint
from tierkv.types import MoveFailure


def counts(cache: TieredCache) -> tuple[int, int, int, int]:
    """Prefetches issued, useful, late and wasted."""
    wasted = cache.loads.num_prefetched_lost + cache.evictors[GPU].num_unused
    loads = cache.loads
    used = cache.pool.num_prefetched_used
    return loads.num_prefetched, used, loads.num_prefetched_late, wasted


def below(tier: dict[str, int], num_tokens: int = 16, pool: int = 8) -> Bench:
    """The blocks of a prompt are in a lower tier only."""
    bench = Bench(pool=pool, **tier)
    bench.cache.release(bench.compute(range(num_tokens)))
    bench.settle()
    bench.cache.release(bench.compute(range(100, 100 + 4 * pool)))
    bench.settle()
    assert bench.cache.lookup(bench.sequence(range(num_tokens + 1))).num_loads == num_tokens // 4
    return bench


def prefetch(bench: Bench, count: int) -> None:
    """The first blocks of the prompt, for later."""
    match = bench.cache.lookup(bench.sequence(range(17)))
    for block in match.blocks[:count]:
        assert block is not None
        bench.cache.loads.prefetch(block)


@pytest.fixture
def bench() -> Bench:
    return below({"cpu": 40})


def test_a_prefetched_block_that_is_there_when_it_is_wanted_was_useful(bench: Bench) -> None:
    prefetch(bench, 3)
    assert counts(bench.cache) == (3, 0, 0, 0)
    bench.settle()
    for expected in (3, 3):  # only the first use says anything
        seq = bench.sequence(range(17))
        bench.admit(seq)
        assert counts(bench.cache) == (3, expected, 0, 0)
        bench.settle()
        bench.cache.release(seq)


def test_one_that_is_still_loading_is_late(bench: Bench) -> None:
    prefetch(bench, 3)
    bench.run()
    first, second = bench.sequence(range(17)), bench.sequence(range(17))
    bench.admit(first)
    bench.admit(second)
    assert counts(bench.cache) == (3, 0, 3, 0)
    bench.settle()
    bench.cache.release(first)
    bench.cache.release(second)
    assert counts(bench.cache) == (3, 0, 3, 0)


def test_one_that_is_evicted_unused_is_wasted(bench: Bench) -> None:
    prefetch(bench, 2)
    bench.settle()
    bench.cache.release(bench.compute(range(200, 232)))
    assert counts(bench.cache) == (2, 0, 0, 2)


def test_so_is_one_that_fails_or_comes_too_late(bench: Bench) -> None:
    prefetch(bench, 2)
    first, second = bench.run()
    bench.mover.end(first, MoveFailure.IO_ERROR)
    bench.run()
    assert counts(bench.cache) == (2, 0, 0, 1)
    bench.clock.time += 100
    bench.run()
    assert counts(bench.cache) == (2, 0, 0, 2)
    bench.mover.end(second)
    bench.run()
    assert counts(bench.cache) == (2, 0, 0, 2)


def test_loads_on_demand_are_no_prefetches(bench: Bench) -> None:
    seq = bench.sequence(range(17))
    bench.admit(seq)
    bench.settle()
    bench.cache.release(seq)
    bench.cache.release(bench.compute(range(200, 232)))
    assert counts(bench.cache) == (0, 0, 0, 0)


def crowded(rng: random.Random) -> Run:
    """Prompts that come back to a pool that holds few of them."""
    mover = {"seed": rng.randrange(1000), "failures": rng.choice([0.0, 0.3])}
    run = Run(
        {
            "num_blocks": rng.choice([24, 40]),
            "block_size": 4,
            "cpu_blocks": rng.choice([0, 100]),
            "nvme_blocks": 200,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "load_policy": "load",
            "load_timeout": rng.choice([3.0, 100.0]),
            "mover": mover,
        }
    )
    for _ in range(30):
        suffix = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]
        run.play([(rng.randrange(3), rng.choice([23, 40, 60]), suffix, 4, 1, 0)])
        run.play([("step", rng.randint(1, 8))])
    return run


def test_every_prefetch_ends_in_one_way() -> None:
    """Over random histories, once nothing is in the pool any more."""
    total = (0, 0, 0, 0)
    for seed in range(40):
        run = crowded(random.Random(seed))
        run.finish()
        found = counts(run.core.cache)
        assert found[0] == sum(found[1:]), seed
        total = tuple(a + b for a, b in zip(total, found, strict=True))
    assert all(total), total


# ---------------------------------------------------------------------- how long waits took


def test_a_wait_is_timed_from_its_beginning_to_its_last_block(bench: Bench) -> None:
    seq = bench.sequence(range(17))
    bench.admit(seq)
    bench.cache.loads.expect(seq, 0.25)
    moves = list(bench.run())
    bench.clock.time += 3
    for move in moves[1:]:
        bench.mover.end(move)
    bench.run()
    assert bench.cache.loads.take_timed() == []
    bench.clock.time += 2
    bench.mover.end(moves[0])
    bench.run()
    assert bench.cache.loads.take_timed() == [(0.25, 5.0)]
    assert bench.cache.loads.take_timed() == []


@pytest.mark.parametrize("what", ["failed", "late", "given up", "nothing to wait for"])
def test_a_wait_that_does_not_end_well_is_not_timed(what: str, bench: Bench) -> None:
    if what == "nothing to wait for":
        prefetch(bench, 4)
        bench.settle()
    seq = bench.sequence(range(17))
    bench.admit(seq)
    bench.cache.loads.expect(seq, 0.25)
    if what == "failed":
        bench.mover.end(bench.run()[-1], MoveFailure.CORRUPT)
    elif what == "late":
        bench.clock.time += 100
    elif what == "given up":
        bench.cache.release(seq)
    bench.settle()
    assert bench.cache.loads.take_timed() == []


# ---------------------------------------------------------------------- the persistent order of use


def test_using_a_stored_block_is_told_to_the_store_once_a_step() -> None:
    bench = Bench(pool=16, nvme=40)
    seq = bench.compute(range(16))
    bench.settle()
    assert bench.mover.touched == [], "writing it notes the time already"
    bench.cache.release(seq)
    bench.run()
    assert bench.mover.touched == [], "a use that ends is not another one"
    first, second = bench.sequence(range(17)), bench.sequence(range(9))
    bench.admit(first)
    bench.admit(second)
    assert bench.mover.touched == []
    bench.run()
    slots = sorted(b.copies[NVME].slot for b in first.blocks if b is not None)
    assert bench.mover.touched == [slots]
    bench.run()
    assert len(bench.mover.touched) == 1
    assert first.blocks[0] is not None
    bench.cache.evictors[NVME].touch(first.blocks[0], AccessHint(ends_use=True))
    assert bench.cache.evictors[NVME].take_touched() == set()


def test_a_load_from_the_store_is_a_use() -> None:
    bench = below({"nvme": 40})
    bench.mover.touched.clear()
    seq = bench.sequence(range(17))
    bench.admit(seq)
    bench.run()
    slots = sorted(b.copies[NVME].slot for b in seq.blocks if b is not None)
    (touched,) = bench.mover.touched
    assert set(slots) <= set(touched)


def test_without_a_store_nobody_is_told() -> None:
    bench = below({"cpu": 40})
    bench.admit(bench.sequence(range(17)))
    bench.run()
    assert bench.mover.touched == [] and CPU in bench.cache.evictors
