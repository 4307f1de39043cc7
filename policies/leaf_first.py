"""Leaf-first ranking: what LRU, FIFO and LFU share.

    every block has a rank; lower leaves first
    candidates = evictable blocks without a child in this tier, in a heap by rank
    propose:  pop the lowest; its parent becomes a candidate when it was the last child
    touch:    the rank changes, the old heap entry becomes stale and is skipped later

Pinned blocks are not in the heap, so a proposal costs nothing for them, and a chain of idle
blocks is proposed tail first in one call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from heapq import heapify, heappop, heappush

from tierkv.policies.base import AccessHint, Key, TreeView, Why

Rank = tuple[float, ...]


class _Entry:
    __slots__ = ("evictable", "num_children", "parent", "rank", "version")

    def __init__(self, parent: Key | None, rank: Rank) -> None:
        self.parent = parent
        self.rank = rank
        self.num_children = 0
        self.evictable = False
        self.version = 0


class LeafFirstPolicy(ABC):
    """An `EvictionPolicy` that orders leaves by a rank; subclasses say which."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._heap: list[tuple[Rank, int, Key]] = []
        self._tick = 0
        self._version = 0

    @abstractmethod
    def first_rank(self, tick: int, hint: AccessHint) -> Rank:
        """The rank of a block that appears at `tick` (counts calls, never repeats)."""

    @abstractmethod
    def next_rank(self, rank: Rank, tick: int, hint: AccessHint) -> Rank:
        """The rank after a use at `tick`."""

    def insert(self, key: Key, parent: Key | None, hint: AccessHint) -> None:
        self._tick += 1
        known_parent = parent if parent in self._entries else None
        self._entries[key] = _Entry(known_parent, self.first_rank(self._tick, hint))
        if known_parent is not None:
            self._entries[known_parent].num_children += 1

    def touch(self, key: Key, hint: AccessHint) -> None:
        self._tick += 1
        entry = self._entries[key]
        rank = self.next_rank(entry.rank, self._tick, hint)
        if rank != entry.rank:
            entry.rank = rank
            self._push(key, entry)

    def set_evictable(self, key: Key, yes: bool) -> None:
        entry = self._entries[key]
        if entry.evictable != yes:
            entry.evictable = yes
            self._push(key, entry)

    def propose(self, n: int, view: TreeView, candidate: Key | None = None) -> list[Key]:
        victims: list[Key] = []
        gone: dict[Key, int] = {}
        popped = []
        extra: list[tuple[Rank, int, Key]] = []
        while len(victims) < n:
            item = self._pop_candidate(extra)
            if item is None:
                break
            popped.append(item)
            victims.append(item[2])
            self._expose_parent(item[2], gone, extra)
        for item in popped:
            entry = self._entries[item[2]]
            if entry.num_children == 0:
                heappush(self._heap, item)
        return victims

    def forget(self, key: Key, why: Why) -> None:
        entry = self._entries.pop(key)
        parent = self._entries.get(entry.parent) if entry.parent is not None else None
        if parent is not None:
            parent.num_children -= 1
            self._push(entry.parent, parent)

    def _push(self, key: Key, entry: _Entry) -> None:
        """Enter the heap if a candidate; whatever was there before becomes stale.

        Versions never repeat, not even when a key leaves and comes back.
        """
        self._version += 1
        entry.version = self._version
        if entry.evictable and entry.num_children == 0:
            heappush(self._heap, (entry.rank, entry.version, key))
            if len(self._heap) > 2 * len(self._entries) + 64:
                self._heap = [item for item in self._heap if self._is_current(item)]
                heapify(self._heap)

    def _is_current(self, item: tuple[Rank, int, Key]) -> bool:
        entry = self._entries.get(item[2])
        return (
            entry is not None
            and entry.version == item[1]
            and entry.evictable
            and entry.num_children == 0
        )

    def _pop_candidate(self, extra: list[tuple[Rank, int, Key]]) -> tuple[Rank, int, Key] | None:
        """The lowest rank among the heap and the parents exposed during this proposal."""
        while self._heap and not self._is_current(self._heap[0]):
            heappop(self._heap)
        if extra and (not self._heap or extra[0] < self._heap[0]):
            return heappop(extra)
        return heappop(self._heap) if self._heap else None

    def _expose_parent(
        self, key: Key, gone: dict[Key, int], extra: list[tuple[Rank, int, Key]]
    ) -> None:
        parent = self._entries[key].parent
        entry = self._entries.get(parent) if parent is not None else None
        if parent is None or entry is None:
            return
        gone[parent] = gone.get(parent, 0) + 1
        if entry.evictable and entry.num_children == gone[parent]:
            heappush(extra, (entry.rank, entry.version, parent))
