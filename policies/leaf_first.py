"""Leaf-first queues: the book-keeping that every eviction policy here shares.

    every block is in a segment and has a rank there; lower leaves first
    candidates = evictable blocks without a child in this tier, in one heap per segment
    propose:  the policy chooses a segment; its lowest is spared (and gets a new place) or given
              up, and then its parent becomes a candidate if that was the last child
    retention: those that are to be kept less than others, or more, are in heaps of their own: the
              policy is asked once the former are gone, the latter go when all others are
    touch:    the place may change; the old heap item becomes stale and is skipped later

Pinned blocks and blocks with children are in no heap, so a proposal costs nothing for them, and a
chain of idle blocks is proposed tail first in one call. No prefix is ever broken, whatever the
ranks are. A parent keeps its place while it has children: if that place is lower than theirs, it
is judged as soon as the last of them goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar

from tierkv.policies.base import AccessHint, Key, TreeView, Why

Rank = tuple[float, ...]
GONE = -1  # the segment of a block that left before its child


class Entry:
    """A block of the tier. `uses` is the policy's own count or bit, `use` what it files it under.

    `version` names the heap item that stands for the block, 0 when none does. A child stays linked
    to a parent that left before it; that one is in no segment and never proposed.
    """

    __slots__ = (
        "evictable",
        "key",
        "num_children",
        "parent",
        "rank",
        "retention",
        "segment",
        "use",
        "uses",
        "version",
    )

    def __init__(self, key: Key, parent: Entry | None) -> None:
        self.key = key
        self.parent = parent
        self.rank: Rank = ()
        self.use: Any = None
        self.segment = self.uses = self.num_children = self.version = self.retention = 0
        self.evictable = False


class LeafQueues(ABC):
    """An `EvictionPolicy` of ranks in segments; subclasses decide.

    Attributes:
        entries: the blocks of the tier, by key.
        sizes: blocks in each segment, pinned ones included; while proposing, less the victims.
        peak: the most blocks held at once before the last insert, which stands for the tier's
            capacity.
    """

    num_segments: ClassVar[int] = 1
    uses_cost: ClassVar[bool] = False

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.sizes = [0] * self.num_segments
        self.peak = 0
        self._heaps: list[_Heap] = [[] for _ in self.sizes]
        self._retained: dict[int, _Heap] = {}
        self._tick = 0
        self._version = 0

    # ------------------------------------------------------------------ what a policy decides

    @abstractmethod
    def entered(self, entry: Entry, hint: AccessHint) -> None:
        """A block appeared: `place` it."""

    @abstractmethod
    def used(self, entry: Entry, hint: AccessHint) -> None:
        """The block was used."""

    def choose(self, candidate: Key | None) -> int:
        """The segment that should lose a block; the first other one does if it has none to lose."""
        return 0

    def spared(self, entry: Entry) -> bool:
        """Whether the lowest of its segment stays, `place`d anew.

        Every yes must use something up, so that the answer is no in the end.
        """
        return False

    def freed(self, entry: Entry) -> None:
        """The block may go from now on: the last moment to rank it."""
        return None

    def left(self, entry: Entry, why: Why) -> None:
        """The block has left the tier."""
        return None

    # ------------------------------------------------------------------ what it decides with

    def tick(self) -> int:
        """Counts up; never repeats."""
        self._tick += 1
        return self._tick

    def place(self, entry: Entry, rank: Rank, segment: int | None = None) -> None:
        """Give the block a rank, in the segment it is in or another one."""
        entry.rank = rank
        if segment is not None and segment != entry.segment:
            self.sizes[entry.segment] -= 1
            self.sizes[segment] += 1
            entry.segment = segment
        if entry.version:
            self._push(entry)

    def move_path(self, entry: Entry, segment: int, rank: Rank) -> None:
        """Place the block and those of its ancestors that share its segment into another one,
        each with this rank or its own if that is higher.

        Whoever uses a block uses its ancestors: what is said of it holds for them too.
        """
        first = entry.segment
        node: Entry | None = entry
        while node is not None and node.segment == first:
            self.place(node, max(node.rank, rank), segment)
            node = node.parent

    def lowest(self, segment: int) -> Entry | None:
        """The candidate that would leave the segment first."""
        return self._lowest_in(self._heaps[segment])

    def _lowest_in(self, heap: _Heap) -> Entry | None:
        while heap and heap[0][2].version != heap[0][1]:
            heappop(heap)
        return heap[0][2] if heap else None

    # ------------------------------------------------------------------ the protocol

    def insert(self, key: Key, parent: Key | None, hint: AccessHint) -> None:
        above = self.entries.get(parent) if parent is not None else None
        entry = self.entries[key] = Entry(key, above)
        self.sizes[0] += 1
        if above is not None:
            above.num_children += 1
            above.version = 0
        self.entered(entry, hint)
        self.peak = max(self.peak, len(self.entries))

    def touch(self, key: Key, hint: AccessHint) -> None:
        self.used(self.entries[key], hint)

    def set_evictable(self, key: Key, yes: bool) -> None:
        entry = self.entries[key]
        if entry.evictable != yes:
            entry.evictable = yes
            self._update(entry)

    def set_retention(self, key: Key, retention: int) -> None:
        entry = self.entries[key]
        entry.retention = retention
        if entry.version:
            self._push(entry)

    def propose(self, n: int, view: TreeView, candidate: Key | None = None) -> list[Key]:
        victims: list[Entry] = []
        while len(victims) < n and (entry := self._next(candidate)) is not None:
            if not entry.retention and self.spared(entry):
                continue
            victims.append(entry)
            if len(victims) < n:
                entry.version = 0
                self._take(entry)
        taken = victims[: n - 1] if n > 0 else []
        for entry in taken:
            self._put_back(entry)
        for entry in taken:
            self._update(entry)
        return [entry.key for entry in victims]

    def forget(self, key: Key, why: Why) -> None:
        entry = self.entries.pop(key)
        entry.evictable, entry.version = False, 0
        self._take(entry)
        self.left(entry, why)
        entry.segment, entry.parent = GONE, None
        if not self.entries:
            self._heaps = [[] for _ in self.sizes]
            self._retained.clear()

    # ------------------------------------------------------------------ the heaps

    def _next(self, candidate: Key | None) -> Entry | None:
        """The next to go; it stays in its heap."""
        if not self._retained:
            return self._next_ordinary(candidate)
        for retention in sorted({0, *self._retained}):
            if retention == 0:
                found = self._next_ordinary(candidate)
            elif (found := self._lowest_in(self._retained[retention])) is None:
                del self._retained[retention]
            if found is not None:
                return found
        return None

    def _next_ordinary(self, candidate: Key | None) -> Entry | None:
        """The lowest of the chosen segment."""
        chosen = self.lowest(self.choose(candidate))
        if chosen is not None or self.num_segments == 1:
            return chosen
        return next(filter(None, map(self.lowest, range(self.num_segments))), None)

    def _take(self, entry: Entry) -> None:
        """Count the block out of its segment and of its parent's children."""
        self.sizes[entry.segment] -= 1
        if entry.parent is not None:
            entry.parent.num_children -= 1
            self._update(entry.parent)

    def _put_back(self, entry: Entry) -> None:
        self.sizes[entry.segment] += 1
        if entry.parent is not None:
            entry.parent.num_children += 1
            entry.parent.version = 0

    def _update(self, entry: Entry) -> None:
        """Make the block a candidate if it may be one; otherwise its heap item becomes stale."""
        if entry.evictable and entry.num_children == 0:
            self.freed(entry)
            self._push(entry)
        else:
            entry.version = 0

    def _push(self, entry: Entry) -> None:
        """Enter the heap of its segment; an item from before becomes stale.

        Versions never repeat, not even when a key leaves and comes back.
        """
        self._version += 1
        entry.version = self._version
        heap = self._heaps[entry.segment]
        if entry.retention:
            heap = self._retained.setdefault(entry.retention, [])
        heappush(heap, (entry.rank, entry.version, entry))
        if len(heap) > 2 * len(self.entries) + 64:
            heap[:] = [item for item in heap if item[2].version == item[1]]
            heapify(heap)


_Heap = list[tuple[Rank, int, Entry]]


class LeafFirstPolicy(LeafQueues):
    """One queue by a rank that depends on the uses of the block alone."""

    @abstractmethod
    def first_rank(self, tick: int, hint: AccessHint) -> Rank:
        """The rank of a block that appears at `tick` (counts calls, never repeats)."""

    @abstractmethod
    def next_rank(self, rank: Rank, tick: int, hint: AccessHint) -> Rank:
        """The rank after a use at `tick`."""

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        self.place(entry, self.first_rank(self.tick(), hint))

    def used(self, entry: Entry, hint: AccessHint) -> None:
        rank = self.next_rank(entry.rank, self.tick(), hint)
        if rank != entry.rank:
            self.place(entry, rank)
