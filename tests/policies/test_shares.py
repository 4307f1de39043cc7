"""What a tenant gives up, and that it is always its own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tierkv.policies import registry
from tierkv.policies.base import AccessHint, Key, Why
from tierkv.policies.shares import TenantShares


class NoTree:
    """Blocks without ancestry."""

    def parent(self, key: Key) -> Key | None:
        return None

    def children(self, key: Key) -> Iterable[Key]:
        return []


VIEW = NoTree()


def shares(name: str = "lru") -> TenantShares:
    return TenantShares(
        registry.create("eviction", name), lambda: registry.create("eviction", name), ["a", "b"]
    )


def fill(policy: TenantShares, keys: Iterable[str], parent: str | None = None) -> None:
    for key in keys:
        policy.insert(key, parent, AccessHint(tenant=key[0]))
        policy.set_evictable(key, True)


@pytest.mark.parametrize("name", [n for n in registry.known("eviction") if n != "belady"])
def test_a_tenant_gives_up_its_own(name: str) -> None:
    policy = shares(name)
    fill(policy, ["a1", "b1", "c1", "a2", "b2", "c2"])
    assert set(policy.propose_own("a", 9, VIEW)) == {"a1", "a2"}
    assert set(policy.propose_own("b", 9, VIEW)) == {"b1", "b2"}
    assert set(policy.propose(9, VIEW)) == {"a1", "a2", "b1", "b2", "c1", "c2"}


def test_it_gives_up_what_is_worth_least_to_itself() -> None:
    policy = shares()
    fill(policy, ["a1", "a2", "b1"])
    policy.touch("a1", AccessHint(tenant="a"))
    assert policy.propose_own("a", 1, VIEW) == ["a2"]
    policy.set_evictable("a2", False)
    assert policy.propose_own("a", 2, VIEW) == ["a1"]
    policy.set_evictable("a2", True)
    policy.set_retention("a2", 3)
    assert policy.propose_own("a", 2, VIEW) == ["a1", "a2"]


def test_its_chains_go_tail_first() -> None:
    policy = shares()
    fill(policy, ["a1"])
    fill(policy, ["a2"], parent="a1")
    fill(policy, ["a3"], parent="a2")
    assert policy.propose_own("a", 9, VIEW) == ["a3", "a2", "a1"]


def test_what_is_forgotten_is_forgotten_by_both() -> None:
    policy = shares()
    fill(policy, ["a1"])
    policy.forget("a1", Why.EVICTED)
    assert policy.propose_own("a", 1, VIEW) == policy.propose(1, VIEW) == []
    fill(policy, ["a1"])
    assert policy.propose_own("a", 1, VIEW) == policy.propose(1, VIEW) == ["a1"]


def test_blocks_from_before_are_adopted() -> None:
    everything = registry.create("eviction", "lru")
    for key in ("x", "y"):
        everything.insert(key, None, AccessHint())
        everything.set_evictable(key, True)
    policy = TenantShares(everything, lambda: registry.create("eviction", "lru"), ["a"])
    assert policy.propose_own("a", 9, VIEW) == []
    policy.adopt("x", None, AccessHint(tenant="a"), evictable=True, retention=0)
    policy.adopt("y", "x", AccessHint(tenant="a"), evictable=False, retention=0)
    assert policy.propose_own("a", 9, VIEW) == []
    policy.set_evictable("y", True)
    assert policy.propose_own("a", 9, VIEW) == ["y", "x"]
    assert "x" in policy and "z" not in policy
