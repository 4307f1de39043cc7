"""ARC: recency (T1) and frequency (T2) share the tier; ghosts of both say who needs more.

    insert:   key in B1: the target of T1 grows, into T2    (T1 gave it up too early)
              key in B2: the target of T1 shrinks, into T2  (T2 did)
              otherwise into T1
    touch:    into T2 as its newest
    propose:  the least recently used of T1 while T1 is above its target, else of T2
    forget:   an evicted key goes to the ghosts: B1 from T1, B2 from T2
    With c blocks of capacity: |T1| + |B1| <= c, and all four together <= 2c.

Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. There the
target moves before the victim is chosen, here when the block comes in, one victim later. The
capacity is the most that the tier has held.
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint, Key, Why
from tierkv.policies.ghosts import Ghosts
from tierkv.policies.leaf_first import Entry, LeafQueues

T1, T2 = 0, 1


class ArcPolicy(LeafQueues):
    """Adaptive replacement, leaf first."""

    num_segments = 2

    def __init__(self) -> None:
        super().__init__()
        self.ghosts = (Ghosts(), Ghosts())
        self._target = 0.0

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        b1, b2 = len(self.ghosts[T1]), len(self.ghosts[T2])
        segment = T2
        if self.ghosts[T1].discard(entry.key):
            self._target = min(self._target + max(1.0, b2 / b1), self.peak)
        elif self.ghosts[T2].discard(entry.key):
            self._target = max(self._target - max(1.0, b1 / b2), 0.0)
        else:
            segment = T1
        self.place(entry, (self.tick(),), segment)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        self.place(entry, (self.tick(),), entry.segment if hint.ends_use else T2)

    def choose(self, candidate: Key | None) -> int:
        size = self.sizes[T1]
        if size > self._target or (size == self._target and candidate in self.ghosts[T2]):
            return T1
        return T2

    def left(self, entry: Entry, why: Why) -> None:
        if why is Why.EVICTED:
            self.ghosts[entry.segment].add(entry.key, self.peak)
            self.ghosts[T1].trim(self.peak - self.sizes[T1])
            self.ghosts[T2].trim(2 * self.peak - sum(self.sizes) - len(self.ghosts[T1]))
