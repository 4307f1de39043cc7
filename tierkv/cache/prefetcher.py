"""Promoting blocks of waiting sequences before their turn.

What is promoted for the sequences at the front of the queue must not be pushed out again for those
behind them: each takes its blocks from a budget of places, also for blocks that are there already.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.cache.evictor import CPU, GPU, NVME
from tierkv.cache.loads import Loads
from tierkv.cache.lookup import Match, lower_tier
from tierkv.cache.lower_tiers import LowerTiers
from tierkv.cache.pool_blocks import PoolBlocks

_STAGED_SHARE = 0.5  # of the CPU tier, for blocks on their way from NVMe to the pool


@dataclass(slots=True)
class PrefetchBudget:
    """What one look at the queue may still spend.

    Attributes:
        moves: to begin.
        pool, staged: places in the pool and in the CPU tier.
    """

    moves: int
    pool: int
    staged: int

    @property
    def is_spent(self) -> bool:
        return self.moves <= 0 or (self.pool <= 0 and self.staged <= 0)


class Prefetcher:
    """Begins loads that nobody waits for yet.

    Args:
        pool, loads, lower: of the cache.
    """

    def __init__(self, pool: PoolBlocks, loads: Loads, lower: LowerTiers) -> None:
        self._pool = pool
        self._loads = loads
        self._lower = lower

    def budget(self, moves: int, num_spare: int) -> PrefetchBudget:
        """For one look at the queue: moves, and pool blocks that may be taken or kept for it."""
        specs = self._lower.specs
        staged = int(specs[CPU].capacity * _STAGED_SHARE) if {CPU, NVME} <= specs.keys() else 0
        return PrefetchBudget(moves, num_spare, staged)

    def promote(self, match: Match, budget: PrefetchBudget) -> int:
        """Begin to promote what a sequence will need: into the pool as far as there is room,
        else from NVMe to the CPU tier; returns how many moves began."""
        begun = 0
        for block in match.blocks:
            if block is None:
                continue
            if GPU in block.copies:
                budget.pool -= block.copies[GPU].is_evictable
                self._pool.touch(block, self._lower.hint_of(block))
            elif budget.is_spent or lower_tier(block) is None:
                break  # the latter: it had to make room for those before it
            elif budget.pool > 0 and self._pool.num_available > 0:
                budget.pool -= 1
                begun += self._loads.prefetch(block)
            elif budget.staged > 0:
                budget.staged -= 1
                begun += self._lower.promote(block)
            else:
                break
        budget.moves -= begun
        return begun
