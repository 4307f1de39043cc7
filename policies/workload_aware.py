"""Workload-aware: the block that is least likely to be used again while it could stay.

    class     of a block's last use: the request's stop reason, and its turn (unknown, 1, 2, later)
    learn     share q of the uses of a class that another one follows, and the mean time tau till
              then, from blocks in the tier and ghosts of those that were evicted; both fade
    P(reuse)  q * (exp(-age / tau) - exp(-(age + life) / tau)),  life: mean age at eviction
    propose   of the classes' least recently used leaves the one with the least P; of one class and
              time the deepest (`leaf_first`)

Wang et al., "KVCache Cache in the Wild: Characterizing and Optimizing KVCache Cache at a Large
Cloud Provider", ATC 2025: reuse of a class is nearly exponential in time, and predictable. There
the classes are also kinds of applications, which nobody names here, and the fit is made offline.
"""

from __future__ import annotations

from math import exp

from tierkv.policies.base import AccessHint, Key, Why
from tierkv.policies.ghosts import GhostValues
from tierkv.policies.leaf_first import Entry, LeafQueues

_STOPS = {"end": 1, "tool_call": 2}
_NUM_TURNS = 4


class Reuse:
    """What is known of a class: uses, those that another one followed, and after how long."""

    __slots__ = ("num_reused", "num_uses", "total_s")

    def __init__(self) -> None:
        self.num_uses, self.num_reused, self.total_s = 1.0, 0.5, 0.5

    def add(self, age_s: float, keep: float) -> None:
        """A use followed."""
        self.num_reused += 1
        self.total_s += age_s
        if keep < 1:
            self.num_uses *= keep
            self.num_reused *= keep
            self.total_s *= keep

    def chance(self, age_s: float, life_s: float) -> float:
        """P(reuse) in the next `life_s` seconds."""
        mean_s = max(self.total_s / self.num_reused, 1e-9)
        share = min(1.0, self.num_reused / self.num_uses)
        return share * exp(-age_s / mean_s) * (1 - exp(-life_s / mean_s))


class WorkloadAwarePolicy(LeafQueues):
    """Least likely to be used again, leaf first.

    Args:
        fade: reuses of a class after which what was learned of it counts half, at least 1.
    """

    num_segments = len(_STOPS) * _NUM_TURNS + _NUM_TURNS

    def __init__(self, fade: float = 1_000_000.0) -> None:
        if fade < 1:
            raise ValueError(f"workload-aware: fade={fade} must be at least 1")
        super().__init__()
        self.ghosts: GhostValues[tuple[int, float]] = GhostValues()
        self._classes = [Reuse() for _ in range(self.num_segments)]
        self._keep = 0.5 ** (1 / fade)
        self._life_s = self._now = 0.0
        self._num_evicted = 0

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        before = self.ghosts.pop(entry.key)
        if before is not None:
            self._classes[before[0]].add(hint.now - before[1], self._keep)
        self._begin_use(entry, hint)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        """`use` is when its last use began, or ended if it has."""
        if not hint.ends_use:
            self._classes[entry.segment].add(hint.now - entry.use, self._keep)
            self._begin_use(entry, hint)
        else:
            self._now = entry.use = hint.now
            self.place(entry, (self.tick(),))

    def _begin_use(self, entry: Entry, hint: AccessHint) -> None:
        self._now = entry.use = hint.now
        kind = _STOPS.get(hint.stop_reason, 0) * _NUM_TURNS + min(max(hint.turn, 0), 3)
        self._classes[kind].num_uses += 1
        self.place(entry, (self.tick(),), kind)

    def choose(self, candidate: Key | None) -> int:
        oldest = [entry for kind in range(self.num_segments) if (entry := self.lowest(kind))]
        return min(oldest, key=self._chance).segment if oldest else 0

    def _chance(self, entry: Entry) -> tuple[float, float]:
        age_s = self._now - entry.use
        return self._classes[entry.segment].chance(age_s, self._life_s), entry.rank[0]

    def left(self, entry: Entry, why: Why) -> None:
        if why is Why.EVICTED:
            self._num_evicted += 1
            weight = 1 / min(self._num_evicted, self.peak)
            self._life_s += weight * (self._now - entry.use - self._life_s)
            self.ghosts.put(entry.key, (entry.segment, entry.use), self.peak)
