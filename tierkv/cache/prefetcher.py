"""Promoting blocks of waiting sequences before their turn.

What is promoted for the sequences at the front of the queue must not be pushed out again for those
behind them: each takes its blocks from a budget of places, also for blocks that are there already.
A look at a sequence goes on where the last one ended; it begins anew when the pool has evicted so
much that what it found may have gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.cache.claims import Claims
from tierkv.cache.evictor import CPU, GPU, NVME
from tierkv.cache.holder import BlockHolder
from tierkv.cache.loads import Loads
from tierkv.cache.lookup import Walker, lower_tier
from tierkv.cache.lower_tiers import LowerTiers
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefix_tree import Block

_STAGED_SHARE = 0.5  # of the CPU tier, for blocks on their way from NVMe to the pool
_STALE_SHARE = 0.1  # of the pool's blocks: so many evictions, and a look begins anew


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


@dataclass(slots=True)
class _Cursor:
    """How far looks at one sequence have come.

    Attributes:
        num_evicted: by the pool, when they began.
        pooled: leading blocks that were in the pool, or on their way; `places` of them in nobody's
            use.
        staged: leading blocks that were at least on their way to the CPU tier.
    """

    num_evicted: int
    pooled: int = 0
    places: int = 0
    staged: int = 0


class Prefetcher:
    """Begins loads that nobody waits for yet.

    Args:
        pool, loads, lower, walker, claims: of the cache.
    """

    def __init__(
        self, pool: PoolBlocks, loads: Loads, lower: LowerTiers, walker: Walker, claims: Claims
    ) -> None:
        self._pool = pool
        self._loads = loads
        self._lower = lower
        self._walker = walker
        self._claims = claims
        self._cursors: dict[int, _Cursor] = {}
        self._before: dict[int, _Cursor] = {}

    def budget(self, moves: int, num_spare: int) -> PrefetchBudget:
        """For one look at the queue: moves, and pool blocks that may be taken or kept for it."""
        specs = self._lower.specs
        staged = int(specs[CPU].capacity * _STAGED_SHARE) if {CPU, NVME} <= specs.keys() else 0
        return PrefetchBudget(moves, num_spare, staged)

    def look_anew(self) -> None:
        """A look at the whole queue begins: who was not seen since the last one is forgotten."""
        self._before, self._cursors = self._cursors, {}

    def promote(self, seq: BlockHolder, budget: PrefetchBudget) -> int:
        """Begin to promote what a sequence will need: into the pool as far as there is room,
        else from NVMe to the CPU tier; returns how many moves began. Its keys are known."""
        cursor = self._cursor_of(seq)
        budget.pool -= cursor.places
        begun, index = 0, cursor.pooled
        while (block := self._walker.find(seq, index)) is not None:
            if GPU in block.copies:
                self._keep(block, cursor, budget)
            elif budget.moves <= begun or self._is_out_of_reach(seq, index, block):
                break
            elif budget.pool > 0 and self._pool.num_available > 0:
                begun += self._loads.prefetch(block)
                self._take_place(cursor, budget)
            elif budget.staged <= 0:
                break
            elif index < cursor.staged:
                budget.staged -= cursor.staged - index
                index = cursor.staged
                continue
            else:
                budget.staged -= 1
                begun += self._lower.promote(block)
                cursor.staged = index + 1
            cursor.pooled += cursor.pooled == index and GPU in block.copies
            index += 1
        budget.moves -= begun
        return begun

    def _cursor_of(self, seq: BlockHolder) -> _Cursor:
        cursor = self._cursors.get(seq.seq_id) or self._before.get(seq.seq_id)
        evicted, stale = self._pool.num_evicted, self._pool.num_blocks * _STALE_SHARE
        if cursor is None or evicted - cursor.num_evicted > stale:
            cursor = _Cursor(evicted, self._walker.first_wanted(seq))
        self._cursors[seq.seq_id] = cursor
        return cursor

    def _keep(self, block: Block, cursor: _Cursor, budget: PrefetchBudget) -> None:
        if block.copies[GPU].is_evictable:
            self._take_place(cursor, budget)
        self._pool.touch(block, self._lower.hint_of(block))

    def _take_place(self, cursor: _Cursor, budget: PrefetchBudget) -> None:
        budget.pool -= 1
        cursor.places += 1

    def _is_out_of_reach(self, seq: BlockHolder, index: int, block: Block) -> bool:
        """It had to make room for blocks before it, or another sequence is computing it anew."""
        return lower_tier(block) is None or self._claims.is_claimed(seq, seq.block_keys[index])
