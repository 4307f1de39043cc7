"""What computing and moving take, from what they took: the numbers behind load-or-recompute.

    compute   tokens * (per_token + per_pair * mean context)
    move      fixed + bytes / rate, one rate for each tier and direction

Every rate starts from a guess or a calibration and follows the measurements with an exponential
mean, so that a slow disk or a busy machine shows within some steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from tierkv.cache.moves import Link, LinkStats
from tierkv.types import TierName

_WEIGHT = 0.2  # of a new measurement
_LEAST_BYTES = 1 << 20  # fewer say little about a rate
_LEAST_TOKENS = 16  # a smaller chunk's time is mostly the step's own


class MeasuredCost:
    """A `CostModel` that learns from the engine's own steps and moves.

    Args:
        block_bytes: bytes of a block.
        per_token_s, per_pair_s: first guess of seconds per computed token, and per pair of a
            token and one of its context.
        rates: first guess of bytes per second, by (tier, is_up).
        fixed_s: seconds from a decision to the first byte.
    """

    def __init__(
        self,
        block_bytes: int,
        *,
        per_token_s: float = 2e-4,
        per_pair_s: float = 2e-8,
        rates: dict[tuple[TierName, bool], float] | None = None,
        fixed_s: float = 1e-3,
    ) -> None:
        self.block_bytes = block_bytes
        self.per_token_s = per_token_s
        self.per_pair_s = per_pair_s
        self.fixed_s = fixed_s
        self.rates = {
            (TierName.CPU, True): 4e9,
            (TierName.CPU, False): 4e9,
            (TierName.NVME, True): 1e9,
            (TierName.NVME, False): 1e9,
            **(rates or {}),
        }
        self._seen: dict[Link, tuple[int, float]] = {}

    def compute_s(self, start: int, num_tokens: int) -> float:
        mean = start + num_tokens / 2
        return num_tokens * (self.per_token_s + self.per_pair_s * mean)

    def up_s(self, tier: TierName, num_blocks: int) -> float:
        return self.fixed_s + num_blocks * self.block_bytes / self.rates[tier, True]

    def down_s(self, tier: TierName, num_blocks: int) -> float:
        return self.fixed_s + num_blocks * self.block_bytes / self.rates[tier, False]

    def note_step(self, chunks: list[tuple[int, int]], seconds: float) -> None:
        """A step computed chunks of `(start, num_tokens)` in `seconds`."""
        if sum(count for _, count in chunks) < _LEAST_TOKENS:
            return
        expected = sum(self.compute_s(start, count) for start, count in chunks)
        factor = 1 + _WEIGHT * (min(10.0, max(0.1, seconds / expected)) - 1)
        self.per_token_s *= factor
        self.per_pair_s *= factor

    def note_moves(self, stats: Mapping[Link, LinkStats]) -> None:
        """Follow what the links have done since the last call."""
        for link, now in stats.items():
            num_bytes, seconds = self._seen.get(link, (0, 0.0))
            moved, took = now.num_bytes - num_bytes, now.seconds - seconds
            if moved < _LEAST_BYTES or took <= 0:
                continue
            self._seen[link] = now.num_bytes, now.seconds
            source, destination = link
            key = (source, True) if destination is TierName.GPU else (destination, False)
            self.rates[key] += _WEIGHT * (moved / took - self.rates[key])
