"""FIFO: the block that appeared first leaves first, used or not.

insert:   rank = the tick of its appearance
touch:    nothing
propose:  leaves by rising rank (`leaf_first`)
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint
from tierkv.policies.leaf_first import LeafFirstPolicy, Rank


class FifoPolicy(LeafFirstPolicy):
    """First in, first out, leaf first."""

    def first_rank(self, tick: int, hint: AccessHint) -> Rank:
        return (tick,)

    def next_rank(self, rank: Rank, tick: int, hint: AccessHint) -> Rank:
        return rank
