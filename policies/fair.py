"""Fair shares of service between tenants: the virtual token counter (VTC).

    counter   tokens served to a tenant, divided by its weight; an output token counts
              `output_cost` prompt tokens, a prompt token that was found in the cache nothing
    next      the first waiting sequence of the tenant with the lowest counter
    joins     a tenant of which nothing waited is lifted to the lowest counter of those that wait
              or, when nobody does, to that of the tenant admitted last: no credit is saved up
              while one is idle

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024: of two tenants that always
have something waiting, neither gets ahead by more than what one batch can hold. Prompt tokens are
charged when a sequence is admitted, output tokens as they come.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from tierkv.policies.order import Rank, WaitingView

_MOST_TENANTS = 1 << 14  # remembered; beyond it, those that a lift would forget are


class FairOrder:
    """The least served tenant first, by weight; within a tenant by priority, then arrival.

    Args:
        output_cost: what an output token counts, in prompt tokens.
    """

    uses_match: ClassVar[bool] = False

    def __init__(self, output_cost: float = 2.0) -> None:
        if not output_cost > 0:
            raise ValueError(f"fair: output_cost={output_cost} must be above 0")
        self._output_cost = output_cost
        self._counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last = ""

    def rank(self, waiting: WaitingView) -> Rank:
        return (waiting.priority, waiting.arrival_s, waiting.arrival_number)

    def set_weight(self, tenant: str, weight: float) -> None:
        if not weight > 0:
            raise ValueError(f"fair: weight={weight} of {tenant!r} must be above 0")
        self._weights[tenant] = weight

    def joined(self, tenant: str, waiting: Iterable[str]) -> None:
        counters = self._counters
        lowest = min((counters.get(other, 0.0) for other in waiting), default=None)
        floor = counters.get(self._last, 0.0) if lowest is None else lowest
        if len(counters) >= _MOST_TENANTS and lowest is None:
            self._counters = counters = {t: c for t, c in counters.items() if c > floor}
        counters[tenant] = max(counters.get(tenant, 0.0), floor)

    def served(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def cost(self, tenant: str, prompt_tokens: int, output_tokens: int = 0) -> float:
        tokens = prompt_tokens + self._output_cost * output_tokens
        return tokens / self._weights.get(tenant, 1.0)

    def admitted(self, tenant: str, prompt_tokens: int) -> None:
        self._last = tenant
        self._charge(tenant, self.cost(tenant, prompt_tokens))

    def generated(self, tenants: Iterable[str]) -> None:
        for tenant in tenants:
            self._charge(tenant, self.cost(tenant, 0, 1))

    def _charge(self, tenant: str, cost: float) -> None:
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost
