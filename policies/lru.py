"""LRU: the block whose last use is longest ago leaves first.

insert, touch:  rank = the tick of this use
propose:        leaves by rising rank (`leaf_first`)
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint
from tierkv.policies.leaf_first import LeafFirstPolicy, Rank


class LruPolicy(LeafFirstPolicy):
    """Least recently used, leaf first."""

    def first_rank(self, tick: int, hint: AccessHint) -> Rank:
        return (tick,)

    def next_rank(self, rank: Rank, tick: int, hint: AccessHint) -> Rank:
        return (tick,)
