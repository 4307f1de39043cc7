"""Promoting blocks of waiting sequences before their turn."""

from __future__ import annotations

from tierkv.cache.evictor import GPU
from tierkv.cache.loads import Loads
from tierkv.cache.lookup import Match, lower_tier
from tierkv.cache.lower_tiers import LowerTiers
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefix_tree import Block


class Prefetcher:
    """Begins loads that nobody waits for yet.

    Args:
        pool, loads, lower: of the cache.
    """

    def __init__(self, pool: PoolBlocks, loads: Loads, lower: LowerTiers) -> None:
        self._pool = pool
        self._loads = loads
        self._lower = lower

    def promote(self, match: Match, num_blocks: int, num_spare: int) -> tuple[int, int]:
        """Begin to promote what a sequence will need: into the pool as far as there is room,
        else from NVMe to the CPU tier.

        Args:
            match: what of the sequence is cached.
            num_blocks: moves begun, at most.
            num_spare: pool blocks that may be taken for it.

        Returns:
            How many moves began, and how many pool blocks they took.
        """
        begun = taken = 0
        for block in match.blocks if match.num_loads else []:
            if block is None:
                continue
            if GPU in block.copies:
                self._pool.touch(block, self._lower.hint_of(block))
                continue
            if begun >= num_blocks or lower_tier(block) is None:
                break  # the latter: it had to make room for those before it
            into_pool = taken < num_spare and self._pool.num_available > 0
            begun += self._begin(block, into_pool=into_pool)
            taken += into_pool
        return begun, taken

    def _begin(self, block: Block, *, into_pool: bool) -> int:
        return self._loads.prefetch(block) if into_pool else self._lower.promote(block)
