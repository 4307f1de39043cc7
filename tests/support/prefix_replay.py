"""One tier of blocks under an eviction policy, driven by requests; and a small synthetic trace.

A request is the list of its block ids from the root on; an id stands for its whole prefix, so it
has one parent. Its leading resident blocks are hits, the others are computed and enter the tier:

    pinned    while there is room beside the request's own blocks, which stay until it ends
              (a GPU pool)
    bypassed  each for as long as the policy keeps it, which may be not at all (a lower tier)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tierkv.policies import registry
from tierkv.policies.base import AccessHint, EvictionPolicy, Key, Why
from tierkv.policies.belady import Future

Trace = Sequence[Sequence[int]]


class PrefixTier:
    """A tier of `capacity` blocks; also the policy's `TreeView`. Raises on a broken proposal."""

    def __init__(self, policy: EvictionPolicy, capacity: int, *, pinned: bool = True) -> None:
        self.policy = policy
        self.capacity = capacity
        self.pinned = pinned
        self.parents: dict[Key, int | None] = {}
        self.num_children: dict[Key, int] = {}
        self._hints: list[AccessHint] = []

    def parent(self, key: Key) -> int | None:
        return self.parents[key]

    def children(self, key: Key) -> list[Key]:
        return [child for child, parent in self.parents.items() if parent == key]

    def serve(self, request: Sequence[int]) -> int:
        """Serve one request; how many of its blocks were hits."""
        policy, parents = self.policy, self.parents
        hits = next((i for i, key in enumerate(request) if key not in parents), len(request))
        while len(self._hints) < len(request):
            self._hints.append(AccessHint(depth=len(self._hints)))
        for depth in range(hits - 1, -1, -1):
            policy.touch(request[depth], self._hints[depth])
        last = request[hits - 1] if hits else None
        self._pin(last, True)  # and by that all before it
        for depth in range(hits, len(request)):
            key = request[depth]
            if self.pinned and self._is_full() and self._evict(key) is None:
                break
            self._enter(key, last, self._hints[depth])
            last = key
            if len(self.parents) > self.capacity and self._evict(key) == key:
                return hits
        self._pin(last, False)
        return hits

    def _is_full(self) -> bool:
        return len(self.parents) >= self.capacity

    def _pin(self, key: int | None, yes: bool) -> None:
        if key is not None and self.pinned:
            self.policy.set_evictable(key, not yes)

    def _enter(self, key: int, parent: int | None, hint: AccessHint) -> None:
        self.policy.insert(key, parent, hint)
        self.parents[key] = parent
        self.num_children[key] = 0
        if parent is not None:
            self.num_children[parent] += 1
        if not self.pinned:
            self.policy.set_evictable(key, True)
        elif parent is not None:
            self.policy.set_evictable(parent, True)

    def _evict(self, candidate: int) -> Key | None:
        """Evict one block; None if the policy has none to give."""
        for victim in self.policy.propose(1, self, candidate):
            if self.num_children.pop(victim):
                raise AssertionError(f"{victim!r} left before its children")
            parent = self.parents.pop(victim)
            if parent is not None:
                self.num_children[parent] -= 1
            self.policy.forget(victim, Why.EVICTED)
            return victim
        return None


@dataclass(slots=True)
class Replayed:
    """What came of a trace: block hits of each request, and the tier as it was left."""

    hits: list[int]
    tier: PrefixTier


def replay(name: str, trace: Trace, capacity: int, *, pinned: bool = True) -> Replayed:
    """Run the trace through a tier under the named eviction policy."""
    policy, advance = make_policy(name, trace)
    tier = PrefixTier(policy, capacity, pinned=pinned)
    hits = []
    for request in trace:
        advance()
        hits.append(tier.serve(request))
    return Replayed(hits, tier)


def make_policy(name: str, trace: Trace = ()) -> tuple[EvictionPolicy, Callable[[], None]]:
    """The policy, and what to call when a request of the trace begins."""
    if name != "belady":
        return registry.create("eviction", name), lambda: None
    future = Future(trace)
    return registry.create("eviction", name, next_use=future.next_use), future.advance


def synthetic_trace(
    seed: int, num_requests: int = 400, num_sessions: int = 40, num_prompts: int = 4
) -> list[list[int]]:
    """Sessions that grow turn by turn behind one of a few shared prompts, and single requests.

    Popular sessions come more often, now and then with the same prompt again; a session that ends
    is replaced by a new one.
    """
    generator = random.Random(seed)
    num_ids = 0

    def fresh(count: int) -> list[int]:
        nonlocal num_ids
        num_ids += count
        return list(range(num_ids - count, num_ids))

    prompts = [fresh(generator.randint(2, 8)) for _ in range(num_prompts)]
    sessions = [generator.choice(prompts) for _ in range(num_sessions)]
    trace = []
    for _ in range(num_requests):
        if generator.random() < 0.3:
            trace.append(generator.choice(prompts) + fresh(generator.randint(1, 12)))
            continue
        index = int(num_sessions * generator.random() ** 2)
        if generator.random() < 0.8:
            sessions[index] = sessions[index] + fresh(generator.randint(1, 4))
        trace.append(sessions[index])
        if generator.random() < 0.1:
            sessions[index] = generator.choice(prompts)
    return trace
