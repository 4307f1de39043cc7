"""Marks on blocks that are wanted longer than the eviction policies would keep them, or less long.

    pinned    its last copy below the pool is not evicted; in the pool it goes after all others for
              as long as no tier below has it, and like any other once one has
    expired   goes before all others, in every tier
    priority  between these: lower goes first
    wanted    in the pool: goes after all but pinned ones, as long as a sequence waits that was seen
              to need it (`Prefetcher`); of two, what was seen first stays

Whoever changes a mark, or a copy of a marked block, has the policies told (`Evictor.renew`).
"""

from __future__ import annotations

import math

from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import copy_below
from tierkv.types import TierName

PINNED = 1 << 20
EXPIRED = -PINNED
"""Retentions beyond every priority."""

_LEAST_WANTED = PINNED >> 1


def wanted_by(number: int) -> int:
    """The retention of what the `number`-th waiting sequence that was looked at will use."""
    return PINNED - 1 - number % _LEAST_WANTED


class Kept:
    """One block's marks.

    Attributes:
        expires_s: when nobody will want it any more, on the engine's clock; infinite for never.
        timer_s: when somebody looks at it next, infinite for never.
    """

    __slots__ = ("expires_s", "is_expired", "is_pinned", "priority", "timer_s")

    def __init__(self) -> None:
        self.priority = 0
        self.expires_s = self.timer_s = math.inf
        self.is_expired = self.is_pinned = False


def is_pinned(block: Block) -> bool:
    return block.kept is not None and block.kept.is_pinned


def is_bound(block: Block, tier: TierName) -> bool:
    """Whether the copy in `tier` may not be evicted: the block is pinned, and this is its last."""
    return tier is not TierName.GPU and is_pinned(block) and copy_below(block, tier) is None


def retention(block: Block, tier: TierName) -> int:
    """How much the copy in `tier` is to be kept, as policies are told."""
    kept, copy = block.kept, block.copies.get(tier)
    if kept is not None and kept.is_pinned and copy_below(block, tier) is None:
        return PINNED
    if copy is not None and copy.wanted:
        return copy.wanted
    if kept is None:
        return 0
    return EXPIRED if kept.is_expired and not kept.is_pinned else kept.priority
