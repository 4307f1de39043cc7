"""Residency: which tier holds which copy, and the only place where a copy's state changes.

    EMPTY -> FILLING     a slot is reserved; bytes are being written (by a computation or a move)
    FILLING -> READY     the bytes are complete
    FILLING -> EMPTY     given up
    READY -> DRAINING    the bytes are on their way down and the slot will be free after it
    READY -> EMPTY       dropped
    DRAINING -> EMPTY    the move down is complete
    DRAINING -> READY    a hit rescued it

Per tier, always: empty + filling + ready + draining == capacity.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from tierkv.cache.prefix_tree import Block, Copy
from tierkv.errors import InvariantError
from tierkv.types import TierName


class CopyState(enum.Enum):
    """State of one block's copy in one tier."""

    EMPTY = "empty"
    FILLING = "filling"
    READY = "ready"
    DRAINING = "draining"


TRANSITIONS: dict[CopyState, frozenset[CopyState]] = {
    CopyState.EMPTY: frozenset({CopyState.FILLING}),
    CopyState.FILLING: frozenset({CopyState.READY, CopyState.EMPTY}),
    CopyState.READY: frozenset({CopyState.DRAINING, CopyState.EMPTY}),
    CopyState.DRAINING: frozenset({CopyState.EMPTY, CopyState.READY}),
}


class Tier:
    """The slots of one tier: a stack of empty ones and a count per state."""

    def __init__(self, name: TierName, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self.empty_slots = list(range(capacity - 1, -1, -1))
        self.counts = dict.fromkeys(CopyState, 0)
        self.counts[CopyState.EMPTY] = capacity

    @property
    def num_empty(self) -> int:
        return len(self.empty_slots)


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
        copy = block.copies[tier] = Copy(slots.empty_slots.pop(), CopyState.EMPTY)
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
        self.free(block.copies.pop(tier), tier)

    def detach(self, block: Block, tier: TierName) -> Copy:
        """Take a FILLING copy away from its block; bytes may still land in the slot, so whoever
        waits for them calls `free`."""
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
        slots.empty_slots.append(copy.slot)

    def adopt(self, source: Block, target: Block, tier: TierName) -> None:
        """`target`, which has no copy in the tier, takes over that of `source`."""
        if tier in target.copies:
            raise InvariantError(f"{target.key.hex()} has a copy in {tier.value} already")
        target.copies[tier] = source.copies.pop(tier)

    def recover(self, block: Block, tier: TierName, slot: int) -> None:
        """The block was found in `slot` when a persistent tier was opened (slots must be taken
        out of `empty_slots` with `reserve` first)."""
        copy = block.copies[tier] = Copy(slot, CopyState.EMPTY)
        self._transition(self.tiers[tier], copy, CopyState.FILLING)
        self._transition(self.tiers[tier], copy, CopyState.READY)

    def reserve(self, tier: TierName, slots: set[int]) -> None:
        """Take these slots out of the empty ones."""
        kept = self.tiers[tier].empty_slots
        kept[:] = [slot for slot in kept if slot not in slots]

    def is_ready(self, block: Block, tier: TierName) -> bool:
        copy = block.copies.get(tier)
        return copy is not None and copy.state is CopyState.READY

    def _transition(self, tier: Tier, copy: Copy, state: CopyState) -> None:
        old = copy.state
        if not isinstance(old, CopyState) or state not in TRANSITIONS[old]:
            raise InvariantError(f"copy in {tier.name.value}: {old} -> {state}")
        tier.counts[old] -= 1
        tier.counts[state] += 1
        copy.state = state
