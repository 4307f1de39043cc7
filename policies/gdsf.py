"""GDSF: what is cheap to bring back, seldom used and old leaves first.

    value = L + uses * cost          L: the age of the tier, 0 at first
    insert:   uses = 1
    touch:    uses + 1; the value is computed anew with today's L
    propose:  by rising value
    forget:   an evicted block's value becomes L, if higher, so that idle blocks fall behind
    cost = seconds to bring the block back: the lesser of load and recompute where the hint tells
    them, else 1 for every block

Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP
Labs 1998. The size is one slot for every block. Leaves only: a deep block may cost more than its
ancestors and still goes before them, so a prefix has no holes.
"""

from __future__ import annotations

from typing import ClassVar

from tierkv.policies.base import AccessHint, Why
from tierkv.policies.leaf_first import Entry, LeafQueues


class GdsfPolicy(LeafQueues):
    """Greedy-dual by frequency and cost, leaf first."""

    uses_cost: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        self.used(entry, hint)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        if entry.uses == 0 or not hint.ends_use:
            entry.uses += 1
            value = self._age + entry.uses * cost_to_return(hint)
            self.place(entry, (value, self.tick()))

    def left(self, entry: Entry, why: Why) -> None:
        if why is Why.EVICTED:
            self._age = max(self._age, entry.rank[0])


def cost_to_return(hint: AccessHint) -> float:
    """Seconds to fetch or compute the block, whichever is less; 1 where neither is known."""
    return min((s for s in (hint.load_s, hint.recompute_s) if s > 0), default=1.0)
