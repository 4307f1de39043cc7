"""Recent times, to tell what is usual without a constant of any workload."""

from __future__ import annotations

from collections.abc import Sequence

_NUM_KEPT = 256
_SORT_EVERY = 32


class RecentTimes:
    """The last 256 samples and their quantiles, which lag by up to 32."""

    def __init__(self) -> None:
        self._recent: list[float] = []
        self._ordered: list[float] = []
        self._count = 0

    def add(self, seconds: float) -> None:
        """Remember it."""
        if len(self._recent) < _NUM_KEPT:
            self._recent.append(seconds)
        else:
            self._recent[self._count % _NUM_KEPT] = seconds
        self._count += 1
        if self._count % _SORT_EVERY == 1:
            self._ordered = sorted(self._recent)

    def quantile(self, share: float, default: float) -> float:
        """The time that this share of the samples are below; the default before there are any."""
        if not self._ordered:
            return default
        return self._ordered[min(int(share * len(self._ordered)), len(self._ordered) - 1)]

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """As `quantile`, for each; nothing before there are samples."""
        return [self.quantile(share, 0.0) for share in shares] if self._ordered else []
