"""SIEVE: a hand sweeps over the blocks by age and takes the first that was not used since.

    insert:   newest place in the queue, not visited
    touch:    visited; the block keeps its place
    propose:  the hand goes from old to new, and then again from the oldest:
                  visited      it stays, no longer visited
                  not visited  it leaves
    rank = (sweep in which the hand comes to it next, tick of its insertion)

Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. Here the hand stops at leaves only; a parent
that it has passed is judged when its last child goes.
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint
from tierkv.policies.leaf_first import Entry, LeafQueues, Rank


class SievePolicy(LeafQueues):
    """SIEVE, leaf first."""

    def __init__(self) -> None:
        super().__init__()
        self._hand: Rank = (0.0, -1)

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        tick = self.tick()
        sweep, seen = self._hand  # past the newest it starts again, and this one comes last
        self.place(entry, (sweep + (seen == tick - 1), tick))

    def used(self, entry: Entry, hint: AccessHint) -> None:
        if not hint.ends_use:
            entry.uses = 1

    def spared(self, entry: Entry) -> bool:
        self._hand = max(self._hand, entry.rank)
        if not entry.uses:
            return False
        entry.uses = 0
        self.place(entry, (self._hand[0] + 1, entry.rank[1]))
        return True
