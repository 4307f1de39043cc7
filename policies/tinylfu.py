"""W-TinyLFU: a newcomer stays only if it is used more often than the block it would push out.

    insert:   into the `window`, counted in a frequency sketch; into `main` while the tier fills up
    touch:    newest of its segment, counted
    propose:  from main while the window is below its share; else the sketch compares the least
              recently used of both:
                  the window's is more frequent: it and its ancestors move to main, main's leaves
                  otherwise the window's leaves
    The sketch ages, so yesterday's favourites lose their seats.

Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM TOS 2017;
the main segment is plain LRU here, not segmented. Pinned newcomers cannot be judged: while there
are many of them the window is larger than its share, and shrinks by one for each that wins.
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint, Key
from tierkv.policies.leaf_first import Entry, LeafQueues
from tierkv.policies.sketch import FrequencySketch

WINDOW, MAIN = 0, 1


class TinyLfuPolicy(LeafQueues):
    """W-TinyLFU, leaf first.

    Args:
        window: share of the capacity that newcomers may keep without competing, 0 to 1.
        sample: uses per block of capacity until the counts are halved.
    """

    num_segments = 2

    def __init__(self, window: float = 0.01, sample: int = 10) -> None:
        if not 0 <= window <= 1 or sample < 1:
            raise ValueError(f"tinylfu: window={window} must be in 0..1, sample={sample} above 0")
        super().__init__()
        self.sketch = FrequencySketch(sample)
        self._window = window

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        fills = len(self.entries) > self.peak
        self.sketch.reserve(self.peak)
        self.sketch.add(entry.key)
        self.place(entry, (self.tick(),), MAIN if fills else WINDOW)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        if not hint.ends_use:
            self.sketch.add(entry.key)
        self.place(entry, (self.tick(),))

    def choose(self, candidate: Key | None) -> int:
        newcomer, rival = self.lowest(WINDOW), self.lowest(MAIN)
        if self.sizes[WINDOW] < self._window * self.peak or newcomer is None or rival is None:
            return MAIN
        if self._count(newcomer) <= self._count(rival):
            return WINDOW
        self.move_path(newcomer, MAIN, newcomer.rank)
        return MAIN

    def _count(self, entry: Entry) -> int:
        return self.sketch.estimate(entry.key)
