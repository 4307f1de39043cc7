"""Whom to preempt when the pool is full.

latest    the one admitted last
priority  the least urgent one, among equals the one admitted last
largest   the one that holds the most blocks, among equals the one admitted last
cheapest  the one that takes least time to bring back, among equals (and where nobody knows) the one
          with the fewest tokens, then the one admitted last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol


@dataclass(slots=True, frozen=True)
class RunningView:
    """What a victim policy may know of a running sequence.

    `recompute_s` and `swap_s` are the estimated seconds until it runs again if its blocks are
    dropped and computed anew, or swapped out and fetched back; inf where unknown or impossible.
    """

    seq_id: int
    priority: int
    arrival_s: float
    admitted_number: int
    num_blocks: int
    num_tokens: int
    recompute_s: float = inf
    swap_s: float = inf


class VictimPolicy(Protocol):
    """Chooses one of at least one candidates; the oldest admitted is never among them, so that
    some sequence always gets to its end."""

    def choose(self, candidates: Sequence[RunningView]) -> int:
        """The `seq_id` to preempt."""
        ...


class LatestVictim:
    """The one admitted last."""

    def choose(self, candidates: Sequence[RunningView]) -> int:
        return max(candidates, key=lambda c: c.admitted_number).seq_id


class PriorityVictim:
    """The least urgent one."""

    def choose(self, candidates: Sequence[RunningView]) -> int:
        return max(candidates, key=lambda c: (c.priority, c.admitted_number)).seq_id


class LargestVictim:
    """The one that holds the most blocks."""

    def choose(self, candidates: Sequence[RunningView]) -> int:
        return max(candidates, key=lambda c: (c.num_blocks, c.admitted_number)).seq_id


class CheapestVictim:
    """The one that takes least time to bring back."""

    def choose(self, candidates: Sequence[RunningView]) -> int:
        return min(candidates, key=self._cost).seq_id

    def _cost(self, view: RunningView) -> tuple[float, int, int]:
        return (min(view.recompute_s, view.swap_s), view.num_tokens, -view.admitted_number)
