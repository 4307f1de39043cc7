"""In which order waiting sequences are admitted: lower rank first.

fcfs      by arrival
priority  by the request's priority (lower first), then arrival
lpm       longest cached prefix first (SGLang, Zheng et al. 2024), then arrival
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

Rank = tuple[float, ...]


@dataclass(slots=True, frozen=True)
class WaitingView:
    """What an order may know of a waiting sequence; `num_matched` is 0 unless it asks for it."""

    arrival_s: float
    arrival_number: int
    priority: int
    num_tokens: int
    num_matched: int


class OrderPolicy(Protocol):
    """Ranks waiting sequences.

    With `uses_match` the rank is asked anew each step, because the cache changes; otherwise once,
    when the sequence enters the queue.
    """

    uses_match: bool

    def rank(self, waiting: WaitingView) -> Rank: ...


class FcfsOrder:
    """First come, first served."""

    uses_match: ClassVar[bool] = False

    def rank(self, waiting: WaitingView) -> Rank:
        return (waiting.arrival_s, waiting.arrival_number)


class PriorityOrder:
    """Lower priority values first."""

    uses_match: ClassVar[bool] = False

    def rank(self, waiting: WaitingView) -> Rank:
        return (waiting.priority, waiting.arrival_s, waiting.arrival_number)


class LongestPrefixOrder:
    """Longest matching cached prefix first."""

    uses_match: ClassVar[bool] = True

    def rank(self, waiting: WaitingView) -> Rank:
        return (-waiting.num_matched, waiting.arrival_s, waiting.arrival_number)
