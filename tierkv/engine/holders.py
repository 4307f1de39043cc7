"""Who holds which slot of the pool, for a window onto it: followed from look to look.

Block tables only grow at their end unless `table_version` says otherwise, so a look costs what has
changed since the last one, not what is held.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import numpy as np

from tierkv.engine.request import Sequence

SHARED = 65_535
"""Owner of a slot that was left by one of several holders."""

_MOST_OWNERS = SHARED - 1
_Array = np.ndarray[Any, np.dtype[Any]]


class _Held:
    """What was noted of one sequence."""

    __slots__ = ("first", "num_complete", "owner", "slots", "version")

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.version = -1
        self.first = 0
        self.slots: list[int] = []
        self.num_complete = 0


class Holders:
    """Holders of the pool's slots.

    Args:
        num_slots: of the pool.
        block_size: tokens per block.

    Attributes:
        counts: of each slot, by how many sequences it is held.
        owners: of each slot, the number of the last one that took it; means nothing where it is
            held by nobody.
        complete: of each slot, whether a holder has computed all of its block.
    """

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.counts = np.zeros(num_slots, np.uint16)
        self.owners = np.zeros(num_slots, np.uint16)
        self.complete = np.zeros(num_slots, np.bool_)
        self._block_size = block_size
        self._held: dict[int, _Held] = {}
        self._free: list[int] = []
        self._num_owners = 0

    def owner(self, seq: Sequence) -> int:
        """The sequence's number at the last look; 0 if it held nothing then."""
        held = self._held.get(seq.seq_id)
        return held.owner if held is not None else 0

    def look(self, sequences: Iterable[Sequence]) -> None:
        """Note what these sequences hold now; whoever is not among them holds nothing."""
        left: list[int] = []
        taken: list[int] = []
        owners: list[int] = []
        complete: list[int] = []
        before, self._held = self._held, {}
        for seq in sequences:
            held = before.pop(seq.seq_id, None) or _Held(self._new_owner())
            self._held[seq.seq_id] = held
            if held.version != seq.table_version:
                self._forget(held, left)
                held.version, held.first = seq.table_version, seq.num_released
            fresh = seq.block_table[held.first + len(held.slots) :]
            if fresh:
                held.slots += fresh
                taken += fresh
                owners += [held.owner] * len(fresh)
            done = seq.num_computed // self._block_size - held.first
            if done > held.num_complete:
                complete += held.slots[held.num_complete : done]
                held.num_complete = done
        for held in before.values():
            self._forget(held, left)
            heapq.heappush(self._free, held.owner)
        self._apply(left, taken, owners, complete)

    def _forget(self, held: _Held, left: list[int]) -> None:
        left += held.slots
        held.slots, held.num_complete = [], 0

    def _apply(
        self, left: list[int], taken: list[int], owners: list[int], complete: list[int]
    ) -> None:
        if left:
            np.subtract.at(self.counts, left, 1)
            self.owners[left] = SHARED
        if taken:
            np.add.at(self.counts, taken, 1)
            self.owners[taken] = owners
            self.complete[taken] = False
        if complete:
            self.complete[complete] = True

    def _new_owner(self) -> int:
        """The smallest number that nobody has."""
        if self._free:
            return heapq.heappop(self._free)
        self._num_owners = min(self._num_owners + 1, _MOST_OWNERS)
        return self._num_owners
