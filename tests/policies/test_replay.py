"""Hits of every eviction policy on small traces, exactly; MIN as the ceiling."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations

import pytest
from prefix_replay import Trace, replay, synthetic_trace

from tierkv.policies import registry

NAMES = registry.known("eviction")
ONLINE = [name for name in NAMES if name != "belady"]
CAPACITIES = (30, 100, 300)

# Hits among the 5,471 blocks (1,307 different ones) of synthetic_trace(1) at each capacity, pinned.
# A change here is a change of what the policy does: say in the commit what and why.
HITS = {
    "lru": [1563, 2831, 3572],
    "fifo": [1556, 2817, 3572],
    "lfu": [1944, 2981, 3716],
    "sieve": [1887, 3028, 3715],
    "s3fifo": [1946, 2936, 3775],
    "arc": [1930, 3111, 3829],
    "tinylfu": [1813, 3032, 3588],
    "gdsf": [1725, 2979, 3687],
    "reuse": [
        1563,
        2831,
        3572,
    ],  # this and those below as lru: no time passes, no session has a name
    "session-protect": [1563, 2831, 3572],
    "workload-aware": [1563, 2831, 3572],
    "retention": [1563, 2831, 3572],
    "belady": [2181, 3564, 4138],
}


@cache
def trace(seed: int) -> list[list[int]]:
    return synthetic_trace(seed)


def num_hits(name: str, trace: Trace, capacity: int, *, pinned: bool = True) -> int:
    return sum(replay(name, trace, capacity, pinned=pinned).hits)


@pytest.mark.parametrize("name", NAMES)
def test_hits_are_exactly_these(name: str) -> None:
    assert [num_hits(name, trace(1), capacity) for capacity in CAPACITIES] == HITS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_tier_that_holds_everything_misses_each_block_once(name: str) -> None:
    unique = len({key for request in trace(1) for key in request})
    total = sum(map(len, trace(1)))
    assert num_hits(name, trace(1), unique) == total - unique


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_beats_the_future(seed: int, pinned: bool) -> None:
    for capacity in (*CAPACITIES, 5):
        best = num_hits("belady", trace(seed), capacity, pinned=pinned)
        for name in ONLINE:
            assert num_hits(name, trace(seed), capacity, pinned=pinned) <= best, (name, capacity)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_belady_is_the_optimum(seed: int, pinned: bool) -> None:
    generator = random.Random(seed)
    parents = [None if i < 2 else generator.choice([None, *range(i)]) for i in range(8)]
    trace = [path(parents, generator.randrange(8)) for _ in range(10)]
    for capacity in (1, 2, 3, 4):
        assert num_hits("belady", trace, capacity, pinned=pinned) == optimum(
            trace, parents, capacity, pinned
        )


def path(parents: list[int | None], key: int | None) -> list[int]:
    return [] if key is None else [*path(parents, parents[key]), key]


def optimum(trace: Trace, parents: list[int | None], capacity: int, pinned: bool) -> int:
    """The most hits that any choice of closed sets gives, by trying all of them."""

    @cache
    def best(index: int, held: frozenset[int]) -> int:
        if index == len(trace):
            return 0
        request = trace[index]
        hits = sum(key in held for key in request)
        kept = frozenset(request[:capacity]) if pinned else frozenset()
        others = sorted((held if pinned else held | set(request)) - kept)
        size = min(len(others), capacity - len(kept))
        return hits + max(
            best(index + 1, kept | set(chosen))
            for chosen in combinations(others, size)
            if all(parents[key] in {None, *kept, *chosen} for key in chosen)
        )

    return best(0, frozenset())


@pytest.mark.parametrize("capacity", [1, 2, 5, 10, 20, 40])
@pytest.mark.parametrize("seed", range(3))
def test_sieve_without_prefixes_is_the_textbook_one(seed: int, capacity: int) -> None:
    generator = random.Random(seed)
    keys = [int(60 * generator.random() ** 2) for _ in range(2000)]
    assert num_hits("sieve", [[key] for key in keys], capacity) == textbook_sieve(keys, capacity)


def textbook_sieve(keys: list[int], capacity: int) -> int:
    """Hits of SIEVE over a plain list, oldest first, with the hand as an index into it."""
    queue: list[int] = []
    visited: set[int] = set()
    hand = hits = 0
    for key in keys:
        if key in queue:
            hits += 1
            visited.add(key)
            continue
        if len(queue) == capacity:
            while queue[hand] in visited:
                visited.remove(queue[hand])
                hand = (hand + 1) % capacity
            del queue[hand]
            hand = hand if hand < len(queue) else 0
        queue.append(key)
    return hits
