"""Residency: which tier holds which copy, and the only place where a copy's state changes.

    EMPTY -> FILLING     a slot is reserved; bytes are being written (by a computation or a move)
    FILLING -> READY     the bytes are complete
    FILLING -> EMPTY     given up
    READY -> DRAINING    the bytes are on their way down and the slot will be free after it
    READY -> EMPTY       dropped
    DRAINING -> EMPTY    the move down is complete
    DRAINING -> READY    a hit rescued it

Per tier, always: empty + filling + ready + draining == capacity. A copy counts for its block's
owner from the moment its slot is reserved.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from tierkv.cache.prefix_tree import Block, Copy
from tierkv.errors import InvariantError
from tierkv.types import TierName

if TYPE_CHECKING:
    from tierkv.cache.shares import Share


class CopyState(enum.Enum):
    """State of one block's copy in one tier; `code` is its number, EMPTY's is 0."""

    EMPTY = "empty"
    FILLING = "filling"
    READY = "ready"
    DRAINING = "draining"

    __hash__ = object.__hash__  # members are singletons; Enum's own hashes the name, in Python

    def __init__(self, value: str) -> None:
        self.code = len(type(self).__members__)


TRANSITIONS: dict[CopyState, frozenset[CopyState]] = {
    CopyState.EMPTY: frozenset({CopyState.FILLING}),
    CopyState.FILLING: frozenset({CopyState.READY, CopyState.EMPTY}),
    CopyState.READY: frozenset({CopyState.DRAINING, CopyState.EMPTY}),
    CopyState.DRAINING: frozenset({CopyState.EMPTY, CopyState.READY}),
}


class Tier:
    """The slots of one tier: a heap of empty ones, a count per state, and the code of each slot's
    state for whoever wants to look at all of them at once.

    The lowest empty slot goes first, so that blocks which come together are neighbours, and
    neighbours move in one operation.
    """

    def __init__(self, name: TierName, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self.empty_slots = list(range(capacity))
        self.counts = dict.fromkeys(CopyState, 0)
        self.counts[CopyState.EMPTY] = capacity
        self.slot_states = bytearray(capacity)

    @property
    def num_empty(self) -> int:
        return len(self.empty_slots)


_BELOW = {tier: list(TierName)[i + 1 :] for i, tier in enumerate(TierName)}


def copy_below(block: Block, tier: TierName) -> TierName | None:
    """The nearest tier below `tier` that has all of the block's bytes."""
    for below in _BELOW[tier]:
        copy = block.copies.get(below)
        if copy is not None and copy.state is CopyState.READY:
            return below
    return None


class Residency:
    """All tiers' slots and the copies in them.

    Args:
        capacities: slots per tier.
    """

    def __init__(self, capacities: Mapping[TierName, int]) -> None:
        self.tiers = {name: Tier(name, capacity) for name, capacity in capacities.items()}

    def begin_fill(self, block: Block, tier: TierName) -> int:
        """Reserve an empty slot for the block; returns the slot.

        Raises:
            InvariantError: no slot is empty, or the block has a copy there (the caller checks).
        """
        slots = self.tiers[tier]
        if not slots.empty_slots or tier in block.copies:
            raise InvariantError(f"no slot to fill in {tier.value} for {block.key.hex()}")
        copy = block.copies[tier] = Copy(heappop(slots.empty_slots), CopyState.EMPTY)
        if block.owner is not None:
            block.owner.counts[tier] += 1
        self._transition(slots, copy, CopyState.FILLING)
        return copy.slot

    def commit_fill(self, block: Block, tier: TierName) -> None:
        """The bytes are complete."""
        self._transition(self.tiers[tier], block.copies[tier], CopyState.READY)

    def drain(self, block: Block, tier: TierName) -> None:
        """The copy's slot will be free once the move that reads it is complete."""
        self._transition(self.tiers[tier], block.copies[tier], CopyState.DRAINING)

    def rescue(self, block: Block, tier: TierName) -> None:
        """Keep a DRAINING copy after all."""
        self._transition(self.tiers[tier], block.copies[tier], CopyState.READY)

    def drop(self, block: Block, tier: TierName) -> None:
        """Give the slot back: a FILLING copy is abandoned, a READY or DRAINING one forgotten."""
        if block.owner is not None:
            block.owner.counts[tier] -= 1
        self.free(block.copies.pop(tier), tier)

    def detach(self, block: Block, tier: TierName) -> Copy:
        """Take a FILLING copy away from its block; bytes may still land in the slot, so whoever
        waits for them calls `free`."""
        if block.owner is not None:
            block.owner.counts[tier] -= 1
        copy = block.copies.pop(tier)
        if copy.state is not CopyState.FILLING:
            raise InvariantError(f"copy in {tier.value}: {copy.state} cannot be detached")
        return copy

    def free(self, copy: Copy, tier: TierName) -> None:
        """Give back the slot of a copy that no block has any more."""
        slots = self.tiers[tier]
        if copy.readers:
            raise InvariantError(f"copy in {tier.value}: slot {copy.slot} is being read")
        self._transition(slots, copy, CopyState.EMPTY)
        heappush(slots.empty_slots, copy.slot)

    def adopt(self, source: Block, target: Block, tier: TierName) -> None:
        """`target`, which has no copy in the tier, takes over that of `source`."""
        if tier in target.copies:
            raise InvariantError(f"{target.key.hex()} has a copy in {tier.value} already")
        if source.owner is not None:
            source.owner.counts[tier] -= 1
        if target.owner is not None:
            target.owner.counts[tier] += 1
        target.copies[tier] = source.copies.pop(tier)

    def own(self, block: Block, owner: Share) -> None:
        """From now on the block's copies count for `owner`."""
        if block.owner is not None:
            block.owner.counts.subtract(dict.fromkeys(block.copies, 1))
        block.owner = owner
        owner.counts.update(dict.fromkeys(block.copies, 1))

    def recover(self, block: Block, tier: TierName, slot: int) -> None:
        """The block was found in `slot` when a persistent tier was opened (slots must be taken
        out of `empty_slots` with `reserve` first)."""
        copy = block.copies[tier] = Copy(slot, CopyState.EMPTY)
        self._transition(self.tiers[tier], copy, CopyState.FILLING)
        self._transition(self.tiers[tier], copy, CopyState.READY)

    def reserve(self, tier: TierName, slots: set[int]) -> None:
        """Take these slots out of the empty ones."""
        kept = self.tiers[tier].empty_slots
        kept[:] = sorted(slot for slot in kept if slot not in slots)

    def is_ready(self, block: Block, tier: TierName) -> bool:
        copy = block.copies.get(tier)
        return copy is not None and copy.state is CopyState.READY

    def _transition(self, tier: Tier, copy: Copy, state: CopyState) -> None:
        old = copy.state
        if not isinstance(old, CopyState) or state not in TRANSITIONS[old]:
            raise InvariantError(f"copy in {tier.name.value}: {old} -> {state}")
        tier.counts[old] -= 1
        tier.counts[state] += 1
        tier.slot_states[copy.slot] = state.code
        copy.state = state
