"""Requests that take no time, one after another: what an eviction policy alone decides.

    request:  1. its leading resident blocks are hits: the deepest is pinned, each is touched, tail
                 first
              2. `propose` gives up as many blocks as its new ones need
              3. the new ones are inserted, root first
              4. all are touched again as their use ends, tail first, and may be evicted

That is what the engine tells the policy of its pool of a request whose prompt is one chunk, and
who generates no full block. The hints have the request's time, session, turn, stop reason, tenant
and priority. One tier; the request's own blocks stay until it ends, and of a prompt that is longer
than the tier the first blocks stay. Token hit rate = hit blocks * block size / input tokens.

`optimum` is MIN (Belady 1966) over the same trace: the most hits that any choice has, with the
whole future known. Blocks whose next use is the same request lie on its path, so that a count of
resident blocks for each next use is all it needs (`policies.belady` is the same, block by block).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from tierkv.policies.base import AccessHint, EvictionPolicy, Key, Why
from tierkv.sim.trace import Trace, TraceRequest


@dataclass(slots=True)
class Hits:
    """What a replay hit.

    Attributes:
        num_requests, num_lookups: requests, and full blocks of their prompts.
        num_hits: of these, the ones that were in the tier.
        input_tokens: of all prompts, with those of blocks that are not full.
        num_evicted: blocks that the policy gave up.
    """

    block_size: int
    num_requests: int = 0
    num_lookups: int = 0
    num_hits: int = 0
    input_tokens: int = 0
    num_evicted: int = 0

    @property
    def rate(self) -> float:
        """Share of the input tokens that were hits."""
        return self.num_hits * self.block_size / max(1, self.input_tokens)

    def count(self, request: TraceRequest, num_blocks: int, hits: int) -> None:
        self.num_requests += 1
        self.num_lookups += num_blocks
        self.num_hits += hits
        self.input_tokens += request.input_tokens


class InstantTier:
    """A tier of `capacity` blocks under an eviction policy; also the policy's `TreeView`.

    One hint object serves all calls and changes between them: a policy must not keep it.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int, block_size: int = 1) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1 block")
        self.policy = policy
        self.capacity = capacity
        self.parents: dict[Key, int | None] = {}
        self.num_evicted = 0
        self._hint = AccessHint(tokens=block_size)

    def parent(self, key: Key) -> int | None:
        return self.parents[key]

    def children(self, key: Key) -> list[Key]:
        return [child for child, parent in self.parents.items() if parent == key]

    def serve(self, request: TraceRequest, ids: Sequence[int]) -> int:
        """Serve a request whose blocks these are; how many of them were hits."""
        self._tell(request)
        hits = self._num_resident(ids)
        self._acquire(ids, hits)
        room = self._make_room(min(len(ids), self.capacity) - hits)
        self._insert(ids, hits, hits + room)
        self._release(ids, hits, hits + room)
        return hits

    def _tell(self, request: TraceRequest) -> None:
        hint = self._hint
        hint.now, hint.session, hint.turn = request.arrival_s, request.session, request.turn
        hint.stop_reason, hint.tenant = request.stop_reason, request.tenant
        hint.priority = request.priority

    def _num_resident(self, ids: Sequence[int]) -> int:
        """How many lead; where a block is, its ancestors are."""
        parents = self.parents
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if ids[middle] in parents:
                low = middle + 1
            else:
                high = middle
        return low

    def _acquire(self, ids: Sequence[int], hits: int) -> None:
        hint, touch = self._hint, self.policy.touch
        hint.ends_use = False
        if hits:
            self.policy.set_evictable(ids[hits - 1], False)
        for depth in range(hits - 1, -1, -1):
            hint.depth = depth
            touch(ids[depth], hint)

    def _make_room(self, wanted: int) -> int:
        """Evict for so many new blocks; for how many there is room now."""
        missing = len(self.parents) + wanted - self.capacity
        if missing > 0:
            forget, parents = self.policy.forget, self.parents
            victims = self.policy.propose(missing, self)
            for key in victims:
                del parents[key]
                forget(key, Why.EVICTED)
            self.num_evicted += len(victims)
        return min(wanted, self.capacity - len(self.parents))

    def _insert(self, ids: Sequence[int], first: int, last: int) -> None:
        hint, insert, parents = self._hint, self.policy.insert, self.parents
        parent = ids[first - 1] if first else None
        for depth in range(first, last):
            key = ids[depth]
            hint.depth = depth
            insert(key, parent, hint)
            parents[key] = parent
            parent = key

    def _release(self, ids: Sequence[int], hits: int, last: int) -> None:
        hint, touch, set_evictable = self._hint, self.policy.touch, self.policy.set_evictable
        hint.ends_use = True
        for depth in range(last - 1, -1, -1):
            key = ids[depth]
            hint.depth = depth
            touch(key, hint)
            if depth >= hits - 1:
                set_evictable(key, True)


def replay(trace: Iterable[TraceRequest], policy: EvictionPolicy, capacity: int, size: int) -> Hits:
    """Run the trace through a tier.

    Args:
        trace: the requests in their order.
        policy: holds nothing yet.
        capacity: blocks of the tier.
        size: tokens per block.

    Raises:
        ValueError: `capacity` is below 1.
    """
    tier = InstantTier(policy, capacity, size)
    hits = Hits(size)
    for request in trace:
        ids = request.block_ids()
        hits.count(request, len(ids), tier.serve(request, ids))
    hits.num_evicted = tier.num_evicted
    return hits


# ---------------------------------------------------------------------- the optimum

_Pieces = list[tuple[int, int]]
"""`(next use, blocks)`: the number of the request that uses them next, `NEVER` if none does."""

NEVER = 1 << 62


@dataclass(slots=True)
class Foreseen:
    """A trace, and when the blocks of each request are used next."""

    requests: list[TraceRequest]
    pieces: list[_Pieces]
    block_size: int
    num_unique: int

    @classmethod
    def of(cls, trace: Trace) -> Foreseen:
        """Look at all of a trace."""
        requests = list(trace)
        following: dict[int, int] = {}
        pieces = [_look_back(number, requests, following) for number in _backwards(requests)]
        pieces.reverse()
        return cls(requests, pieces, trace.block_size, len(following))

    def infinite(self) -> Hits:
        """What a tier for all blocks hits."""
        hits = Hits(self.block_size)
        for request in self.requests:
            hits.count(request, request.num_blocks, 0)
        hits.num_hits = hits.num_lookups - self.num_unique
        return hits


def _backwards(requests: Sequence[TraceRequest]) -> Iterator[int]:
    return iter(range(len(requests) - 1, -1, -1))


def _look_back(number: int, requests: Sequence[TraceRequest], following: dict[int, int]) -> _Pieces:
    """The pieces of a request, root first, from what comes after it."""
    pieces: _Pieces = []
    for first, count in requests[number].runs:
        ids = range(first, first + count)
        for after in map(following.get, ids):
            use = NEVER if after is None else after
            if pieces and pieces[-1][0] == use:
                pieces[-1] = (use, pieces[-1][1] + 1)
            else:
                pieces.append((use, 1))
        following.update(dict.fromkeys(ids, number))
    return pieces


def optimum(foreseen: Foreseen, capacity: int, *, pinned: bool = False) -> Hits:
    """MIN: the most hits in a tier of `capacity` blocks.

    Args:
        foreseen: the trace.
        capacity: blocks of the tier.
        pinned: a request's blocks stay until it ends, as in a GPU pool; otherwise one may leave
            before the next comes, as if it had passed the tier by.
    """
    hits = Hits(foreseen.block_size)
    tier = _Optimum(capacity)
    for number, request in enumerate(foreseen.requests):
        num_blocks = request.num_blocks
        hits.count(request, num_blocks, tier.take(number))
        kept = foreseen.pieces[number]
        if pinned:
            kept = _first(kept, capacity)
            tier.shrink_to(capacity - sum(count for _, count in kept))
        tier.put(kept)
        tier.shrink_to(capacity)
    hits.num_evicted = tier.num_evicted
    return hits


def _first(pieces: _Pieces, num_blocks: int) -> _Pieces:
    kept: _Pieces = []
    for use, count in pieces:
        kept.append((use, min(count, num_blocks)))
        num_blocks -= kept[-1][1]
    return kept


class _Optimum:
    """Resident blocks counted by their next use."""

    def __init__(self, capacity: int) -> None:
        self.num_resident = self.num_evicted = 0
        self._counts: dict[int, int] = {}
        self._farthest: list[int] = []

    def take(self, number: int) -> int:
        """The request comes: how many blocks wait for it."""
        count = self._counts.pop(number, 0)
        self.num_resident -= count
        return count

    def put(self, pieces: _Pieces) -> None:
        for use, count in pieces:
            if count and use not in self._counts:
                heappush(self._farthest, -use)
            if count:
                self._counts[use] = self._counts.get(use, 0) + count
                self.num_resident += count

    def shrink_to(self, num_blocks: int) -> None:
        """Give up those whose next use is farthest away."""
        while self.num_resident > num_blocks:
            use = -self._farthest[0]
            count = self._counts.get(use, 0)
            given_up = min(count, self.num_resident - num_blocks)
            self.num_resident -= given_up
            self.num_evicted += given_up
            if given_up < count:
                self._counts[use] = count - given_up
            else:
                self._counts.pop(use, None)
                heappop(self._farthest)
