"""What `reuse` learns, and from how little it may know."""

from __future__ import annotations

import random

import pytest

from tierkv.policies import registry
from tierkv.policies.base import AccessHint, Why
from tierkv.policies.reuse import ReusePolicy
from tierkv.policies.reuse_curves import (
    NUM_BANDS,
    WIDTHS,
    ReuseCurves,
    band_of,
    end_of,
    hull,
)
from tierkv.sim.instant import InstantTier
from tierkv.sim.trace import TraceRequest


def worth_by_definition(hazards: list[float], first: int) -> float:
    """The best ratio of hits to room over all moments to give up."""
    hits = room = best = 0.0
    alive = 1.0
    for hazard, width in zip(hazards[first:], WIDTHS[first:], strict=True):
        hits += alive * hazard
        room += alive * (1 - hazard / 2) * width
        alive *= 1 - hazard
        best = max(best, hits / room)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_worth_is_the_best_ratio_of_hits_to_room(seed: int) -> None:
    generator = random.Random(seed)
    hazards = [generator.choice([0.0, 1.0, generator.random()]) for _ in range(NUM_BANDS)]
    expected = [worth_by_definition(hazards, band) for band in range(NUM_BANDS)]
    assert hull(hazards) == pytest.approx(expected)


def test_bands_cover_all_ages() -> None:
    ages = (-1.0, 0.0, 1e-9, 0.06, 0.07, 1e300)
    assert [band_of(age) for age in ages] == [0, 0, 0, 0, 1, NUM_BANDS - 1]
    assert all(width > 0 for width in WIDTHS)
    assert sum(WIDTHS) == pytest.approx(end_of(NUM_BANDS - 1))
    for band in range(NUM_BANDS - 1):
        assert band_of(end_of(band) * 1.001) == band + 1
        assert band_of(end_of(band) * 0.999) == band


def test_curves_learn_each_kind_and_fade() -> None:
    curves = ReuseCurves(3)
    for kind, reused in ((0, 90.0), (1, 10.0)):
        curves.entered[kind][:2] = [100.0, 100.0]
        curves.reused[kind][1] = reused
    curves.refresh(prior=1.0, keep=0.5)
    assert curves.worth[0][0] > curves.worth[1][0] > 0
    assert not any(curves.worth[2]), "of this kind nothing was seen"
    assert curves.entered[0][1] == 50.0 and curves.reused[0][1] == 45.0


class Driver:
    """Requests of one block for each of `first..first + count - 1`, at a time."""

    def __init__(self, capacity: int) -> None:
        self.policy = ReusePolicy()
        self.tier = InstantTier(self.policy, capacity)

    def serve(self, now: float, first: int, count: int, **fields: str) -> int:
        request = TraceRequest(now, count, 1, ((first, count),), **fields)
        return self.tier.serve(request, request.block_ids())


def teach(driver: Driver, stop_of: dict[bool, str], start: float = 0.0) -> float:
    """Chains of 8 blocks, one in two seconds; every other one comes back once, 5 s later."""
    now = start
    for number in range(200):
        now = start + 2.0 * number
        driver.serve(now, 1000 * number + 8, 8, stop_reason=stop_of[number % 2 == 0])
        if number >= 3 and number % 2 == 1:  # the chain of three before
            driver.serve(now + 0.5, 1000 * (number - 3) + 8, 8)
    return now


def test_what_comes_back_after_a_tool_call_is_kept() -> None:
    driver = Driver(capacity=64)
    now = teach(driver, {True: "tool_call", False: "end"}) + 10
    driver.serve(now, 1, 4, stop_reason="tool_call")
    driver.serve(now + 0.1, 900_001, 4, stop_reason="end")
    victims = driver.policy.propose(64, driver.tier)
    assert victims.index(900_001) < victims.index(1)


def test_without_stop_reasons_the_older_goes_first() -> None:
    driver = Driver(capacity=64)
    now = teach(driver, {True: "", False: ""}) + 10
    driver.serve(now, 1, 4)
    driver.serve(now + 0.01, 900_001, 4)
    victims = driver.policy.propose(64, driver.tier)
    assert victims.index(1) < victims.index(900_001)


def test_it_learns_from_blocks_that_are_gone() -> None:
    driver = Driver(capacity=16)  # nothing comes back while it is there
    now = teach(driver, {True: "tool_call", False: "end"}) + 10
    assert sum(map(sum, driver.policy._curves.reused)) > 500
    driver.serve(now, 1, 4, stop_reason="tool_call")
    driver.serve(now + 0.1, 900_001, 4, stop_reason="end")
    victims = driver.policy.propose(16, driver.tier)
    assert victims.index(900_001) < victims.index(1)


def test_counts_stay_those_of_blocks_that_are_watched() -> None:
    driver = Driver(capacity=40)
    teach(driver, {True: "tool_call", False: ""})
    policy = driver.policy
    watched = {id(use): use for _, _, use in policy._due}
    ghosts = sum(use.blocks for use in watched.values()) - len(policy.entries)
    assert 0 < ghosts <= 4 * len(policy.ghosts)
    assert len(policy.ghosts) <= 2 * policy.peak
    assert all(min(counts) > -1e-6 for counts in policy._curves.entered)


def test_state_is_bounded_when_no_time_passes() -> None:
    driver = Driver(capacity=8)
    for number in range(3000):
        driver.serve(0.0, 10 * number, 3)
    assert len(driver.policy._due) <= 2 * (8 + 16) + 65


def test_lower_tiers_tell_less_and_that_is_enough() -> None:
    """No use ends there, and blocks may come without their ancestors, deepest first."""
    policy = ReusePolicy()
    for number in range(100):
        hint = AccessHint(now=float(number))
        for key in (3 * number + 2, 3 * number + 1, 3 * number):
            policy.insert(key, None, hint)
            policy.set_evictable(key, True)
        if number >= 2 and number % 2:
            policy.touch(3 * (number - 2), hint)
        while len(policy.entries) > 30:
            policy.forget(policy.propose(1, NO_TREE)[0], Why.EVICTED)
    assert len(policy.propose(30, NO_TREE)) == 30
    assert sum(map(sum, policy._curves.reused)) == pytest.approx(49, rel=0.01)  # they fade


class _NoTree:
    def parent(self, key: object) -> None:
        return None

    def children(self, key: object) -> list[object]:
        return []


NO_TREE = _NoTree()


@pytest.mark.parametrize(
    "spec",
    [
        *("reuse:prior=0", "reuse:fade=0.5", "session-protect:most=2", "session-protect:wait=-1"),
        *("retention:share=1.5", "workload-aware:fade=0"),
    ],
)
def test_parameters_out_of_range_are_named(spec: str) -> None:
    name, _, parameter = spec.partition(":")
    with pytest.raises(ValueError, match=f"{name}: .*{parameter.partition('=')[0]}"):
        registry.create("eviction", spec)


class Chains:
    """Blocks of conversations that branch, in two policies: one is told block by block, the other
    chain by chain."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.policies = ReusePolicy(), ReusePolicy()
        self.parents: dict[int, int | None] = {}
        self.now = 0.0
        self._names = 0

    def chain(self, key: int | None) -> list[int]:
        """A block and its ancestors, deepest first."""
        found = []
        while key is not None:
            found.append(key)
            key = self.parents[key]
        return found

    def hint(self, depth: int, *, ends: bool) -> AccessHint:
        return AccessHint(self.now, depth, 16, stop_reason=self.stop, ends_use=ends)

    def grow(self) -> None:
        """A request that continues some chain by a few blocks, uses it, and ends."""
        self.now += self.random.choice([0.0, 0.5, 40.0])
        self.stop = self.random.choice(["", "end", "tool_call"])
        tip = self.random.choice([None, *self.parents])
        self.tell(self.chain(tip), ends=False)
        for _ in range(self.random.randint(0, 6)):
            self._names += 1
            self.parents[self._names] = tip
            depth = len(self.chain(tip))
            for policy in self.policies:
                policy.insert(self._names, tip, self.hint(depth, ends=False))
                policy.set_evictable(self._names, True)
            tip = self._names
        self.tell(self.chain(tip), ends=True)

    def tell(self, chain: list[int], *, ends: bool) -> None:
        single, whole = self.policies
        for index, key in enumerate(chain):
            single.touch(key, self.hint(len(chain) - 1 - index, ends=ends))
        if chain:
            whole.touch_chain(chain, self.hint(len(chain) - 1, ends=ends))

    def shrink(self) -> None:
        """Both propose the same, and some of it goes."""
        single, whole = (policy.propose(8, None) for policy in self.policies)  # type: ignore[arg-type]
        assert single == whole
        for key in whole[: self.random.randint(0, 8)]:
            assert isinstance(key, int)
            del self.parents[key]
            for policy in self.policies:
                policy.forget(key, Why.EVICTED)


@pytest.mark.parametrize("seed", range(8))
def test_a_chain_at_once_is_its_blocks_one_by_one(seed: int) -> None:
    chains = Chains(seed)
    for _ in range(120):
        chains.grow()
        if len(chains.parents) > 60:
            chains.shrink()
    assert len(chains.parents) > 20
