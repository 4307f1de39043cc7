"""What computing and moving take, from what they took: the numbers behind load-or-recompute.

    compute   tokens * (per_token + per_pair * mean context)
    move      fixed + bytes / rate, one rate for each tier and direction

Every rate starts from a guess or a calibration and follows the measurements with an exponential
mean, so that a slow disk or a busy machine shows within some steps.
"""

from __future__ import annotations

from tierkv.types import TierName

_WEIGHT = 0.2  # of a new measurement
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

    def note_moves(self, tier: TierName, *, is_up: bool, num_bytes: int, seconds: float) -> None:
        """Moves of `num_bytes` between the pool and `tier` took `seconds` of copying."""
        if num_bytes and seconds > 0:
            old = self.rates[tier, is_up]
            self.rates[tier, is_up] = old + _WEIGHT * (num_bytes / seconds - old)
