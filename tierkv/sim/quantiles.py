"""Quantiles of many positive numbers in little memory.

A number falls into a bucket of the width of 1 % of itself (DDSketch, Masson et al., VLDB 2019, with
relative accuracy 0.5 %); 0 and what is too small to matter have a bucket of their own.
"""

from __future__ import annotations

from collections import Counter
from math import ceil, log

_GROWTH = 1.01
_LEAST = 1e-6
_LOG_GROWTH = log(_GROWTH)


class Quantiles:
    """Adds numbers of at least 0 and tells quantiles of them, each within 0.5 %."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self._buckets[self._bucket(value)] += 1

    def _bucket(self, value: float) -> int:
        return 0 if value <= _LEAST else ceil(log(value / _LEAST) / _LOG_GROWTH)

    def quantile(self, share: float) -> float:
        """The number that `share` of all do not exceed; 0.0 when there are none.

        Args:
            share: in [0, 1].
        """
        wanted, seen = share * self.count, 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return 0.0 if bucket == 0 else _LEAST * 2 * _GROWTH**bucket / (1 + _GROWTH)
        return 0.0

    def cdf(self, points: int = 100) -> list[tuple[float, float]]:
        """`(value, share of numbers up to it)`, at most `points` of them, rising."""
        shares = [(i + 1) / points for i in range(points)] if self.count else []
        return [(self.quantile(share), share) for share in shares]

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0
