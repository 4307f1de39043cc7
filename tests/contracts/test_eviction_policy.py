"""What every eviction policy must do, run over each that is built in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tierkv.policies import registry
from tierkv.policies.base import AccessHint, EvictionPolicy, Key, Why
from tierkv.policies.ghosts import Ghosts, GhostValues
from tierkv.policies.leaf_first import Entry
from tierkv.policies.shares import TenantShares

HINT = AccessHint()
SHARED = "shared:"  # a policy and another one for the blocks of a tenant
NAMES = [*registry.known("eviction"), f"{SHARED}lru", f"{SHARED}s3fifo"]


def make(name: str) -> EvictionPolicy:
    """The policy; `belady` gets a future in which the deeper is needed later, or never."""
    if name.startswith(SHARED):
        inner = name.removeprefix(SHARED)
        return TenantShares(make(inner), lambda: make(inner), ["a", "b"])
    given: dict[str, Any] = {}
    if name == "belady":
        given["next_use"] = lambda key: float(key) if key % 3 else float("inf")
    made: EvictionPolicy = registry.create("eviction", name, **given)
    return made


class Tree:
    """The blocks of one tier, as the cache would know them; also the policy's `TreeView`."""

    def __init__(self) -> None:
        self.parents: dict[Key, Key | None] = {}
        self.evictable: set[Key] = set()
        self.retention: dict[Key, int] = {}

    def parent(self, key: Key) -> Key | None:
        return self.parents[key]

    def children(self, key: Key) -> Iterable[Key]:
        return [child for child, parent in self.parents.items() if parent == key]

    def lowest_retention(self, gone: Iterable[Key]) -> int:
        """Of the blocks that could go now, once others are gone."""
        free = self.evictable.difference(gone)
        leaves = [key for key in free if set(self.children(key)) <= set(gone)]
        return min(self.retention.get(key, 0) for key in leaves)

    def most_evictable(self) -> int:
        """How many blocks could go, leaf first, if all were asked for."""
        gone: set[Key] = set()
        while True:
            more = {
                key
                for key in self.evictable - gone
                if all(child in gone for child in self.children(key))
            }
            if not more:
                return len(gone)
            gone |= more


@pytest.fixture(params=NAMES)
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return make(request.param)


def add(policy: EvictionPolicy, tree: Tree, key: Key, parent: Key | None, free: bool) -> None:
    policy.insert(key, parent, HINT)
    tree.parents[key] = parent
    if free:
        policy.set_evictable(key, True)
        tree.evictable.add(key)


def test_a_new_block_is_not_evictable(policy: EvictionPolicy) -> None:
    tree = Tree()
    add(policy, tree, 1, None, free=False)
    assert policy.propose(1, tree) == []


def test_an_idle_chain_goes_tail_first_in_one_call(policy: EvictionPolicy) -> None:
    tree = Tree()
    for key in range(1000):
        add(policy, tree, key, key - 1 if key else None, free=True)
    assert policy.propose(1000, tree) == list(range(999, -1, -1))


def test_a_pinned_child_protects_its_ancestors(policy: EvictionPolicy) -> None:
    tree = Tree()
    for key in range(5):
        add(policy, tree, key, key - 1 if key else None, free=key != 3)
    assert policy.propose(5, tree) == [4]


def test_a_block_may_be_there_without_its_ancestors(policy: EvictionPolicy) -> None:
    tree = Tree()
    policy.insert(2, 1, HINT)  # 1 is not in this tier
    policy.set_evictable(2, True)
    add(policy, tree, 1, None, free=True)  # and comes later
    assert set(policy.propose(5, tree)) == {1, 2}
    policy.forget(2, Why.EVICTED)
    assert policy.propose(5, tree) == [1]


def test_a_parent_may_leave_before_its_child(policy: EvictionPolicy) -> None:
    tree = Tree()
    for key in range(3):
        add(policy, tree, key, key - 1 if key else None, free=True)
    policy.forget(1, Why.REMOVED)
    policy.insert(1, 0, HINT)
    assert policy.propose(5, tree) == [2]
    policy.forget(2, Why.EVICTED)
    assert policy.propose(5, tree) == []
    policy.set_evictable(1, True)
    assert policy.propose(5, tree) == [1, 0]


def test_what_is_to_be_kept_less_goes_first_and_more_last(policy: EvictionPolicy) -> None:
    tree = Tree()
    for key in range(8):
        add(policy, tree, key, None, free=True)
    for key, retention in ((6, 5), (1, -7), (2, -7), (3, 1000), (4, 5), (4, 0)):
        policy.set_retention(key, retention)
    assert set(policy.propose(2, tree)) == {1, 2}
    found = policy.propose(8, tree)
    assert set(found[2:6]) == {0, 4, 5, 7} and found[6:] == [6, 3]
    policy.touch(6, HINT)
    assert policy.propose(8, tree)[6:] == [6, 3], "a use changes nothing"
    policy.forget(3, Why.EVICTED)
    policy.insert(3, None, HINT)
    policy.set_evictable(3, True)
    assert policy.propose(8, tree)[7] == 6, "a block that comes back is like any other"


def test_a_child_that_is_kept_keeps_its_ancestors(policy: EvictionPolicy) -> None:
    tree = Tree()
    for key in range(4):
        add(policy, tree, key, key - 1 if key else None, free=True)
    add(policy, tree, 9, None, free=True)
    policy.set_retention(0, -5)
    policy.set_retention(2, 5)
    assert policy.propose(2, tree) in ([3, 9], [9, 3])
    assert policy.propose(5, tree)[2:] == [2, 1, 0]


def test_nothing_is_proposed_for_nothing(policy: EvictionPolicy) -> None:
    tree = Tree()
    add(policy, tree, 1, None, free=True)
    assert policy.propose(0, tree) == []


def test_proposing_drops_nothing(policy: EvictionPolicy) -> None:
    tree = Tree()
    for key in range(6):
        add(policy, tree, key, None, free=True)
    first = policy.propose(6, tree)
    assert sorted(first) == list(range(6))
    assert sorted(policy.propose(6, tree)) == list(range(6))


def test_a_key_may_leave_and_come_back(policy: EvictionPolicy) -> None:
    tree = Tree()
    for _ in range(3):
        for key in range(4):
            add(policy, tree, key, None, free=True)
            policy.touch(key, HINT)
        assert sorted(policy.propose(4, tree)) == [0, 1, 2, 3]
        for key in range(4):
            policy.forget(key, Why.REMOVED)


def test_the_cost_of_a_proposal_does_not_grow_with_pinned_blocks(policy: EvictionPolicy) -> None:
    tree = Tree()
    for key in range(20):
        add(policy, tree, key, None, free=True)
    before = count_calls(policy, tree)
    for key in range(100, 5100):
        add(policy, tree, key, None, free=False)
        policy.touch(key, HINT)
    assert count_calls(policy, tree) <= before + 5


def count_calls(policy: EvictionPolicy, tree: Tree) -> int:
    """Function calls made by one small proposal."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        policy.propose(3, tree)
    finally:
        sys.setprofile(None)
    return calls


class Machine(RuleBasedStateMachine):
    """A policy beside a model of its tier, a twin that gets the same calls, and a third one whose
    victims are asked for one by one. Keys 0..30; a key's parent is always a smaller one."""

    name = ""

    def __init__(self) -> None:
        super().__init__()
        self.policies = [make(self.name) for _ in range(3)]
        self.tree = Tree()
        self.peak = 0

    @rule(key=st.integers(0, 30), parent=st.integers(0, 30), depth=st.integers(0, 3))
    def insert(self, key: int, parent: int, depth: int) -> None:
        if key in self.tree.parents:
            return
        above = parent if parent < key and parent in self.tree.parents else None
        hint = AccessHint(depth=depth, recompute_s=depth / 8, tenant=["", "a", "b"][key % 3])
        for policy in self.policies:
            policy.insert(key, above, hint)
        self.tree.parents[key] = above
        self.peak = max(self.peak, len(self.tree.parents))

    @precondition(lambda self: self.tree.parents)
    @rule(data=st.data(), ends_use=st.booleans())
    def touch(self, data: st.DataObject, ends_use: bool) -> None:
        key = data.draw(st.sampled_from(list(self.tree.parents)))
        for policy in self.policies:
            policy.touch(key, AccessHint(ends_use=ends_use))

    @precondition(lambda self: self.tree.parents)
    @rule(data=st.data(), yes=st.sampled_from([True, True, True, False]))
    def set_evictable(self, data: st.DataObject, yes: bool) -> None:
        key = data.draw(st.sampled_from(list(self.tree.parents)))
        for policy in self.policies:
            policy.set_evictable(key, yes)
        (self.tree.evictable.add if yes else self.tree.evictable.discard)(key)

    @precondition(lambda self: self.tree.parents)
    @rule(data=st.data(), retention=st.sampled_from([-1, 0, 0, 1, 7]))
    def set_retention(self, data: st.DataObject, retention: int) -> None:
        key = data.draw(st.sampled_from(list(self.tree.parents)))
        for policy in self.policies:
            policy.set_retention(key, retention)
        self.tree.retention[key] = retention

    @rule(n=st.integers(0, 40), candidate=st.none() | st.integers(0, 30))
    def propose(self, n: int, candidate: int | None) -> None:
        self.proposed(n, candidate)
        self.policies[2].propose(n, self.tree, candidate)

    @rule(n=st.integers(1, 8))
    def evict(self, n: int) -> None:
        for victim in self.proposed(n, None):
            assert self.policies[2].propose(1, self.tree) == [victim]
            self.forget(victim, Why.EVICTED)

    @precondition(lambda self: self.tree.parents)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.forget(data.draw(st.sampled_from(list(self.tree.parents))), Why.REMOVED)

    def proposed(self, n: int, candidate: int | None) -> list[Key]:
        """A proposal, checked: each victim is free and a leaf when its turn comes."""
        victims, same = (p.propose(n, self.tree, candidate) for p in self.policies[:2])
        assert victims == same
        assert len(victims) == min(n, self.tree.most_evictable())
        for place, victim in enumerate(victims):
            assert victim in self.tree.evictable
            assert victim not in victims[:place]
            assert set(self.tree.children(victim)) <= set(victims[:place])
            lowest = self.tree.lowest_retention(victims[:place])
            assert self.tree.retention.get(victim, 0) == lowest
        return victims

    def forget(self, key: Key, why: Why) -> None:
        for policy in self.policies:
            policy.forget(key, why)
        for child in self.tree.children(key):
            self.tree.parents[child] = None
        del self.tree.parents[key]
        self.tree.evictable.discard(key)
        self.tree.retention.pop(key, None)

    def teardown(self) -> None:
        for key in list(self.tree.parents):
            self.forget(key, Why.REMOVED)
        for part in parts(self.policies[0]):
            assert not isinstance(part, Ghosts | GhostValues) or len(part) <= 2 * self.peak
            assert not isinstance(part, Entry), part
            if isinstance(part, dict):  # by tenant: policies, which are looked into themselves
                part = {key: value for key, value in part.items() if not hasattr(value, "propose")}
            assert not isinstance(part, dict | set) or not part, part


def parts(thing: object) -> Iterator[object]:
    """The thing and what its attributes and containers hold, without what ghosts remember."""
    yield thing
    if isinstance(thing, dict | list | set | tuple):
        members = [*thing.values()] if isinstance(thing, dict) else [*thing]
    elif type(thing).__module__.partition(".")[0] != "tierkv":
        return
    else:
        members = [] if isinstance(thing, REMEMBERED) else attributes(thing)
    for member in members:
        yield from parts(member)


def attributes(thing: object) -> list[object]:
    slots = getattr(type(thing), "__slots__", None)
    return [*vars(thing).values()] if slots is None else [getattr(thing, name) for name in slots]


REMEMBERED = (Entry, Ghosts, GhostValues)


@pytest.mark.parametrize("name", NAMES)
def test_any_history(name: str) -> None:
    machine = type(name, (Machine,), {"name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=60, deadline=None, derandomize=True, database=None
        ),
    )
