"""Which block each policy gives up first, and what it remembers."""

from __future__ import annotations

import pytest

from tierkv.policies import registry
from tierkv.policies.arc import ArcPolicy
from tierkv.policies.base import AccessHint, EvictionPolicy, Key, Why
from tierkv.policies.belady import BeladyPolicy, Future
from tierkv.policies.gdsf import GdsfPolicy
from tierkv.policies.s3fifo import S3FifoPolicy
from tierkv.policies.sketch import FrequencySketch
from tierkv.policies.tinylfu import TinyLfuPolicy

HINT = AccessHint()
END = AccessHint(ends_use=True)


class NoTree:
    def parent(self, key: Key) -> None:
        return None

    def children(self, key: Key) -> list[Key]:
        return []


TREE = NoTree()


def insert(policy: EvictionPolicy, keys: str, hint: AccessHint = HINT) -> None:
    for key in keys:
        policy.insert(key, None, hint)
        policy.set_evictable(key, True)


def touch(policy: EvictionPolicy, keys: str, hint: AccessHint = HINT) -> None:
    for key in keys:
        policy.touch(key, hint)


def evict(policy: EvictionPolicy, n: int) -> str:
    victims = policy.propose(n, TREE)
    for key in victims:
        policy.forget(key, Why.EVICTED)
    return "".join(map(str, victims))


@pytest.mark.parametrize(
    ("name", "victims"),
    [
        # inserted a b c d; then used a, a, b
        ("lru", "cdab"),
        ("fifo", "abcd"),
        ("lfu", "cdba"),
        ("sieve", "cdab"),
        ("s3fifo", "bcda"),
        ("arc", "cdab"),
        ("tinylfu", "cdab"),
        ("gdsf", "cdba"),
        ("reuse", "cdab"),
        ("session-protect", "cdab"),
        ("workload-aware", "cdab"),
        ("retention", "cdab"),
    ],
)
def test_order(name: str, victims: str) -> None:
    policy: EvictionPolicy = registry.create("eviction", name)
    insert(policy, "abcd")
    touch(policy, "aab")
    assert evict(policy, 4) == victims


@pytest.mark.parametrize("name", ["lfu", "sieve", "s3fifo:promote=1", "gdsf"])
def test_the_end_of_a_use_is_no_second_use(name: str) -> None:
    policy: EvictionPolicy = registry.create("eviction", name)
    insert(policy, "abc")
    touch(policy, "b")
    touch(policy, "abc", END)
    assert evict(policy, 3) == "acb"


def test_sieve_keeps_places_and_forgets_visits() -> None:
    policy: EvictionPolicy = registry.create("eviction", "sieve")
    insert(policy, "abc")
    touch(policy, "ab")
    assert evict(policy, 1) == "c"  # the hand passed a and b
    insert(policy, "d")
    touch(policy, "b")
    assert evict(policy, 3) == "adb"


def test_s3fifo_remembers_what_left_the_small_queue() -> None:
    policy = S3FifoPolicy()
    insert(policy, "abc")
    assert evict(policy, 1) == "a"
    assert "a" in policy.ghosts
    insert(policy, "a")
    assert "a" not in policy.ghosts
    assert evict(policy, 3) == "bca"  # a is in the main queue


def test_arc_shifts_to_what_it_gave_up_too_early() -> None:
    policy = ArcPolicy()
    insert(policy, "abcd")
    touch(policy, "ab")
    assert evict(policy, 1) == "c"  # of T1, which holds c and d
    insert(policy, "c")  # its ghost was in B1: T1 may hold one
    assert evict(policy, 1) == "a"  # T2 holds a b c
    insert(policy, "a")  # its ghost was in B2: T1 may hold none
    assert evict(policy, 1) == "d"


def test_arc_breaks_the_tie_for_a_candidate_that_t2_gave_up() -> None:
    policy = ArcPolicy()
    insert(policy, "abcd")
    touch(policy, "ab")
    evict(policy, 1)
    insert(policy, "c")
    assert evict(policy, 1) == "a"
    assert policy.propose(1, TREE) == ["b"]
    assert policy.propose(1, TREE, candidate="a") == ["d"]


def test_arc_bounds_its_ghosts() -> None:
    policy = ArcPolicy()
    for number in range(1000):
        policy.insert(number, None, HINT)
        policy.set_evictable(number, True)
        if number % 3:
            policy.touch(number, HINT)
        if number >= 10:
            policy.forget(policy.propose(1, TREE)[0], Why.EVICTED)
    assert sum(map(len, policy.ghosts)) <= 2 * policy.peak
    removed = next(iter(policy.entries))
    policy.forget(removed, Why.REMOVED)
    assert not any(removed in ghosts for ghosts in policy.ghosts)


def test_tinylfu_lets_no_stranger_push_out_a_regular() -> None:
    policy = TinyLfuPolicy(window=0.25)
    insert(policy, "abcd")
    touch(policy, "abcd")
    evict(policy, 1)
    for stranger in "efg":
        insert(policy, stranger)
        assert evict(policy, 1) == stranger
    insert(policy, "a")  # seen twice before
    assert evict(policy, 1) == "b"


def test_gdsf_weighs_uses_by_cost_and_ages() -> None:
    policy = GdsfPolicy()
    insert(policy, "a", AccessHint(recompute_s=3.0))
    insert(policy, "b", AccessHint(recompute_s=3.0, load_s=1.0))
    insert(policy, "c", AccessHint(load_s=2.0))
    assert evict(policy, 2) == "bc"
    insert(policy, "d", AccessHint(load_s=2.0))  # as valuable as c, but two seconds later
    assert evict(policy, 2) == "ad"


def test_belady_knows() -> None:
    future = Future(["abcd", "a", "b", "a", "c"])
    policy = BeladyPolicy(future.next_use)
    future.advance()
    insert(policy, "abcd")
    assert policy.propose(4, TREE) == ["d", "c", "b", "a"]
    future.advance()
    touch(policy, "a")
    assert policy.propose(4, TREE) == ["d", "c", "a", "b"]


def test_belady_needs_a_future() -> None:
    with pytest.raises(ValueError, match=r"belady needs the future.*as the optimum"):
        registry.create("eviction", "belady")


@pytest.mark.parametrize(
    "spec", ["s3fifo:small=2", "s3fifo:promote=0", "tinylfu:window=-1", "tinylfu:sample=0"]
)
def test_parameters_out_of_range_are_named(spec: str) -> None:
    name, _, parameter = spec.partition(":")
    with pytest.raises(ValueError, match=f"{name}: .*{parameter}"):
        registry.create("eviction", spec)


def test_the_sketch_counts_ages_and_grows() -> None:
    sketch = FrequencySketch(sample=10)
    for _ in range(6):
        sketch.add(b"0123456789abcdef")
    sketch.add("word")
    sketch.reserve(1000)
    assert [sketch.estimate(k) for k in (b"0123456789abcdef", "word", 7)] == [6, 1, 0]
    for number in range(10_240 - 7):
        sketch.add(number)
    assert sketch.estimate(b"0123456789abcdef") in (3, 4)
