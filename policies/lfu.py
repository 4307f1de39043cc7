"""LFU: the block used least often leaves first; among equals the least recently used.

insert:   rank = (1, tick)
touch:    rank = (uses + 1, tick); the end of a use counts for the tick only
propose:  leaves by rising rank (`leaf_first`)
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint
from tierkv.policies.leaf_first import LeafFirstPolicy, Rank


class LfuPolicy(LeafFirstPolicy):
    """Least frequently used, leaf first."""

    def first_rank(self, tick: int, hint: AccessHint) -> Rank:
        return (1, tick)

    def next_rank(self, rank: Rank, tick: int, hint: AccessHint) -> Rank:
        return (rank[0] if hint.ends_use else rank[0] + 1, tick)
