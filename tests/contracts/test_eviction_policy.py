"""What every eviction policy must do, run over each that is built in."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.policies import registry
from tierkv.policies.base import AccessHint, EvictionPolicy, Key, Why

HINT = AccessHint()
NAMES = registry.known("eviction")


class Tree:
    """The blocks of one tier, as the cache would know them; also the policy's `TreeView`."""

    def __init__(self) -> None:
        self.parents: dict[Key, Key | None] = {}
        self.evictable: set[Key] = set()

    def parent(self, key: Key) -> Key | None:
        return self.parents[key]

    def children(self, key: Key) -> Iterable[Key]:
        return [child for child, parent in self.parents.items() if parent == key]

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
    made: EvictionPolicy = registry.create("eviction", request.param)
    return made


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


steps = st.lists(
    st.tuples(
        st.sampled_from(["insert", "touch", "free", "pin", "evict", "remove"]),
        st.integers(0, 40),
        st.integers(0, 40),
    ),
    max_size=120,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps)
def test_any_history_keeps_prefixes_closed(name: str, history: list[tuple[str, int, int]]) -> None:
    policy: EvictionPolicy = registry.create("eviction", name)
    tree = Tree()
    for verb, key, other in history:
        if verb == "insert" and key not in tree.parents:
            parent = other if other in tree.parents else None
            add(policy, tree, key, parent, free=False)
        elif verb == "evict":
            evict(policy, tree, other % 5 + 1)
        elif key in tree.parents:
            apply(policy, tree, verb, key)
    count = tree.most_evictable()
    assert len(policy.propose(1000, tree)) == count


def apply(policy: EvictionPolicy, tree: Tree, verb: str, key: Key) -> None:
    if verb == "touch":
        policy.touch(key, HINT)
    elif verb in ("free", "pin"):
        policy.set_evictable(key, verb == "free")
        (tree.evictable.add if verb == "free" else tree.evictable.discard)(key)
    elif verb == "remove" and not list(tree.children(key)):
        drop(policy, tree, key, Why.REMOVED)


def evict(policy: EvictionPolicy, tree: Tree, n: int) -> None:
    """Take a proposal at its word: each victim must be free and a leaf when its turn comes."""
    expected = min(n, tree.most_evictable())
    victims = policy.propose(n, tree)
    assert len(victims) == expected
    for victim in victims:
        assert victim in tree.evictable
        assert not list(tree.children(victim))
        drop(policy, tree, victim, Why.EVICTED)


def drop(policy: EvictionPolicy, tree: Tree, key: Key, why: Why) -> None:
    policy.forget(key, why)
    del tree.parents[key]
    tree.evictable.discard(key)
