"""In which order waiting sequences are admitted: lower rank first.

fcfs      by arrival
priority  by the request's priority (lower first), then arrival
lpm       longest cached prefix first (SGLang, Zheng et al. 2024), then arrival
fair      the tenant that was served least first (VTC, in `fair.py`)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

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


@runtime_checkable
class ServiceOrder(OrderPolicy, Protocol):
    """An order between tenants by what each was served; `rank` is within a tenant."""

    def set_weight(self, tenant: str, weight: float) -> None:
        """How large the tenant's share is, above 0; others have 1."""
        ...

    def joined(self, tenant: str, waiting: Iterable[str]) -> None:
        """A sequence comes of a tenant of which none waits; `waiting` are tenants with some."""
        ...

    def served(self, tenant: str) -> float:
        """What the tenant was served; the one with the least is next."""
        ...

    def cost(self, tenant: str, prompt_tokens: int, output_tokens: int = 0) -> float:
        """By how much `served` grows with so many tokens."""
        ...

    def admitted(self, tenant: str, prompt_tokens: int) -> None:
        """A sequence was admitted of which so many tokens are to be computed."""
        ...

    def generated(self, tenants: Iterable[str]) -> None:
        """One token for each was sampled; a tenant comes as often as it has tokens."""
        ...


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
