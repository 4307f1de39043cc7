"""Which block each policy gives up first."""

from __future__ import annotations

import pytest

from tierkv.policies import registry
from tierkv.policies.base import AccessHint, EvictionPolicy, Key


class NoTree:
    def parent(self, key: Key) -> None:
        return None

    def children(self, key: Key) -> list[Key]:
        return []


@pytest.mark.parametrize(
    ("name", "victims"),
    [
        # inserted a b c d; then used a, a, b
        ("lru", ["c", "d", "a", "b"]),
        ("fifo", ["a", "b", "c", "d"]),
        ("lfu", ["c", "d", "b", "a"]),
    ],
)
def test_order(name: str, victims: list[str]) -> None:
    policy: EvictionPolicy = registry.create("eviction", name)
    for key in "abcd":
        policy.insert(key, None, AccessHint())
        policy.set_evictable(key, True)
    for key in "aab":
        policy.touch(key, AccessHint())
    assert policy.propose(4, NoTree()) == victims
