"""The replay without time: what a policy is told, what counts as a hit, and the optimum."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from prefix_replay import replay as replay_blocks
from prefix_replay import synthetic_trace

from tierkv.policies import registry
from tierkv.policies.base import AccessHint, Key, Why
from tierkv.policies.lru import LruPolicy
from tierkv.sim.coarsen import coarsen
from tierkv.sim.generate import generate_trace
from tierkv.sim.instant import Foreseen, InstantTier, optimum, replay
from tierkv.sim.trace import Trace, TraceRequest

# Block hits of 800 requests of generated agents (33,150 blocks of 128 tokens, 2,230 different ones)
# in 67 blocks, pinned. A change here is a change of what the policy does: say in the commit why.
HITS = {
    "lru": 6813,
    "reuse": 7254,
    "session-protect": 6907,
    "workload-aware": 6858,
    "retention": 6888,
}

NAMES = [name for name in registry.known("eviction") if name != "belady"]


def as_trace(paths: list[list[int]], block_size: int = 4) -> Trace:
    """Requests a second apart; a token more than their blocks hold."""

    def begin() -> Iterator[TraceRequest]:
        for number, path in enumerate(paths):
            runs = tuple((key, 1) for key in path)
            yield TraceRequest(float(number), len(path) * block_size + 1, 1, runs)

    return Trace("paths", block_size, begin)


class Recorder(LruPolicy):
    """LRU that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []

    def insert(self, key: Key, parent: Key | None, hint: AccessHint) -> None:
        self.calls.append(("insert", key, parent, hint.depth, hint.now))
        super().insert(key, parent, hint)

    def touch(self, key: Key, hint: AccessHint) -> None:
        self.calls.append(("end" if hint.ends_use else "touch", key, hint.depth, hint.session))
        super().touch(key, hint)

    def set_evictable(self, key: Key, yes: bool) -> None:
        self.calls.append(("free" if yes else "pin", key))
        super().set_evictable(key, yes)

    def forget(self, key: Key, why: Why) -> None:
        self.calls.append(("forget", key, why))
        super().forget(key, why)


def test_the_policy_is_told_what_the_engine_tells_it() -> None:
    policy = Recorder()
    tier = InstantTier(policy, 3)
    first = TraceRequest(1.0, 8, 1, ((10, 2),), session="a")
    second = TraceRequest(2.0, 12, 1, ((10, 1), (20, 2)), session="b")
    assert tier.serve(first, first.block_ids()) == 0
    assert tier.serve(second, second.block_ids()) == 1
    assert policy.calls == [
        ("insert", 10, None, 0, 1.0),
        ("insert", 11, 10, 1, 1.0),
        *(("end", 11, 1, "a"), ("free", 11), ("end", 10, 0, "a"), ("free", 10)),
        *(("pin", 10), ("touch", 10, 0, "b")),
        ("forget", 11, Why.EVICTED),
        ("insert", 20, 10, 1, 2.0),
        ("insert", 21, 20, 2, 2.0),
        *(("end", 21, 2, "b"), ("free", 21), ("end", 20, 1, "b"), ("free", 20)),
        *(("end", 10, 0, "b"), ("free", 10)),
    ]
    assert tier.num_evicted == 1
    assert tier.parent(20) == 10 and tier.children(10) == [20]


def test_of_a_prompt_that_is_too_long_the_beginning_stays() -> None:
    tier = InstantTier(LruPolicy(), 3)
    request = TraceRequest(0.0, 20, 1, ((1, 5),))
    assert [tier.serve(request, request.block_ids()) for _ in range(2)] == [0, 3]
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        InstantTier(LruPolicy(), 0)


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_stay_closed_and_the_optimum_is_one(name: str) -> None:
    trace = as_trace(synthetic_trace(2))
    foreseen = Foreseen.of(trace)
    for capacity in (5, 40, 150):
        policy = registry.create("eviction", name)
        tier = InstantTier(policy, capacity)
        hits = 0
        for request in trace:
            ids = request.block_ids()
            led = next((i for i, key in enumerate(ids) if key not in tier.parents), len(ids))
            assert tier.serve(request, ids) == led
            hits += led
            assert len(tier.parents) <= capacity
            assert all(p is None or p in tier.parents for p in tier.parents.values())
        pinned = optimum(foreseen, capacity, pinned=True)
        assert hits <= pinned.num_hits <= optimum(foreseen, capacity).num_hits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pinned", [True, False])
def test_the_optimum_is_that_of_the_policy(seed: int, pinned: bool) -> None:
    """Which is compared with all choices of closed sets in tests/policies/test_replay.py."""
    paths = synthetic_trace(seed, num_requests=120, num_sessions=12)
    foreseen = Foreseen.of(as_trace(paths))
    for capacity in (1, 3, 10, 40, 120):
        found = optimum(foreseen, capacity, pinned=pinned)
        assert found.num_hits == sum(replay_blocks("belady", paths, capacity, pinned=pinned).hits)


def test_a_tier_for_everything_hits_all_but_the_first_time() -> None:
    trace = as_trace(synthetic_trace(1))
    foreseen = Foreseen.of(trace)
    infinite = foreseen.infinite()
    for found in (
        replay(trace, LruPolicy(), foreseen.num_unique, trace.block_size),
        optimum(foreseen, foreseen.num_unique),
    ):
        assert found == infinite
    assert infinite.rate == 4 * infinite.num_hits / infinite.input_tokens
    assert infinite.num_lookups == sum(len(path) for path in synthetic_trace(1))


def test_runs_and_single_blocks_are_the_same() -> None:
    runs = [((0, 6),), ((0, 3), (100, 4)), ((0, 6), (50, 2)), ((0, 3), (100, 2))]
    requests = [TraceRequest(float(n), 99, 1, each) for n, each in enumerate(runs)]
    single = [
        [key for first, count in each for key in range(first, first + count)] for each in runs
    ]
    whole = Foreseen.of(Trace("runs", 4, lambda: iter(requests)))
    parts = Foreseen.of(as_trace(single))
    assert whole.pieces == parts.pieces
    for capacity in range(1, 14):
        assert optimum(whole, capacity).num_hits == optimum(parts, capacity).num_hits


@pytest.fixture(scope="module")
def agents() -> Foreseen:
    return Foreseen.of(coarsen(generate_trace("agents", num_requests=800, seed=1), 128))


@pytest.mark.parametrize("name", HITS)
def test_hits_are_exactly_these(name: str, agents: Foreseen) -> None:
    policy = registry.create("eviction", name)
    assert replay(agents.requests, policy, 67, agents.block_size).num_hits == HITS[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_trace_gives_the_same_hits(name: str) -> None:
    generator = random.Random(5)
    paths = synthetic_trace(generator.randrange(100))
    found = [
        replay(as_trace(paths), registry.create("eviction", name), 60, 4).num_hits for _ in range(2)
    ]
    assert found[0] == found[1]
