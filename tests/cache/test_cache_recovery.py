"""What a restart knows of the past: the order in which a persistent tier's blocks leave."""

from __future__ import annotations

import itertools
import random

import pytest
from hand_mover import NVME, Bench

from tierkv.cache.check import check_cache
from tierkv.cache.recovery import recover
from tierkv.policies.base import Why
from tierkv.storage.base import StoredBlock

ROOT = bytes(16)
_generations = itertools.count(1)


def stored(name: str, last_use: float, parent: str = "", hits: int = 0) -> StoredBlock:
    """A block that was written after all that this function made before."""
    generation = next(_generations)
    above = parent.encode().ljust(16) if parent else ROOT
    key = name.encode().ljust(16)
    return StoredBlock(generation % 1000, key, above, key, generation, hits, last_use)


def leaving(blocks: list[StoredBlock], eviction: str = "lru") -> list[str]:
    """The blocks in the order in which they leave when nothing else happens."""
    bench = Bench(nvme=1000, eviction=eviction)
    assert recover(bench.cache, blocks) == len(blocks)
    check_cache(bench.cache, [])
    evictor = bench.cache.evictors[NVME]
    left = []
    while victims := evictor.victims(1):
        left.append(victims[0].key.decode().strip())
        evictor.drop(victims[0], Why.EVICTED)
    assert len(left) == len(blocks)
    return left


def test_what_was_used_longest_ago_leaves_first() -> None:
    blocks = [stored("a", 30.0), stored("b", 10.0), stored("c", 20.0)]
    assert leaving(blocks) == ["b", "c", "a"]


def test_of_blocks_used_at_the_same_time_the_one_written_first_leaves_first() -> None:
    """As after a crash that took the index: nothing is known but the order of writes."""
    blocks = [stored(name, 0.0) for name in "abc"]
    assert leaving(blocks[::-1]) == ["a", "b", "c"]


def test_a_parent_that_is_used_with_one_child_outlives_what_is_older_than_that_use() -> None:
    blocks = [
        stored("root", 40.0, hits=2),
        stored("old", 10.0, "root"),
        stored("new", 40.0, "root", hits=1),
        stored("x", 20.0),
        stored("y", 30.0),
    ]
    assert leaving(blocks) == ["old", "x", "y", "new", "root"]


def test_a_parent_whose_children_are_gone_leaves_by_its_own_use() -> None:
    blocks = [stored("root", 40.0, hits=1), stored("old", 10.0, "root"), stored("x", 20.0)]
    assert leaving(blocks) == ["old", "x", "root"]


def test_a_block_whose_parent_is_lost_has_its_place() -> None:
    blocks = [stored("a", 20.0), stored("stray", 10.0, "lost"), stored("b", 30.0)]
    assert leaving(blocks) == ["stray", "a", "b"]


@pytest.mark.parametrize("eviction", ["lru", "fifo", "s3fifo", "arc", "lfu", "gdsf", "sieve"])
@pytest.mark.parametrize("seed", range(5))
def test_any_tree_is_taken_in_parents_first(eviction: str, seed: int) -> None:
    chance = random.Random(seed)
    blocks: list[StoredBlock] = []
    for number in range(60):
        parent = chance.choice([*(b.key.decode().strip() for b in blocks), "lost", ""])
        name, last_use = str(number), chance.choice([0.0, chance.uniform(0, 9)])
        blocks.append(stored(name, last_use, parent, chance.choice([0, 0, 3])))
    chance.shuffle(blocks)
    left = leaving(blocks, eviction)
    above = {b.key.decode().strip(): b.parent.decode().strip() for b in blocks}
    for place, name in enumerate(left):
        assert above[name] not in left[:place], "a parent left before its child"


def test_recovering_is_no_use() -> None:
    """What the store is told of uses comes from requests."""
    bench = Bench(nvme=1000)
    recover(bench.cache, [stored("a", 5.0, hits=3)])
    bench.run()
    assert bench.mover.touched == []


def test_uses_before_and_after_a_restart_are_one_order() -> None:
    """What is used now outlives what the last process used."""
    bench = Bench(nvme=1000)
    recover(bench.cache, [stored("a", 5.0), stored("b", 6.0)])
    evictor = bench.cache.evictors[NVME]
    (block,) = [block for block in bench.cache.tree if block.key.startswith(b"a")]
    evictor.touch(block, bench.cache.hint_of(block))
    assert [victim.key[:1] for victim in evictor.victims(2)] == [b"b", b"a"]
