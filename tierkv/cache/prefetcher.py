"""Promoting blocks of waiting sequences before their turn.

What is promoted for the sequences at the front of the queue must not be pushed out again for those
behind them: each takes its blocks from a budget of places, also for blocks that are there already,
and what it will use is marked as wanted, so that whatever nobody waits for goes before it. A look
at a sequence goes on where the last one ended, unless the pool has given up what that one found.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from tierkv.cache.claims import Claims
from tierkv.cache.evictor import CPU, GPU, NVME
from tierkv.cache.holder import BlockHolder
from tierkv.cache.kept import wanted_by
from tierkv.cache.loads import Loads
from tierkv.cache.lookup import Walker, lower_tier
from tierkv.cache.lower_tiers import LowerTiers
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState

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


@dataclass(slots=True)
class _Cursor:
    """How far looks at one sequence have come.

    Attributes:
        number: the sequence's, in the order in which they were first looked at.
        pooled: leading blocks that were in the pool, or on their way; `places` of them in nobody's
            use.
        staged: leading blocks that were at least on their way to the CPU tier.
        wanted: those of them that are marked.
    """

    number: int
    pooled: int = 0
    places: int = 0
    staged: int = 0
    wanted: list[Block] = field(default_factory=list)


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
        self._numbers = itertools.count()

    def budget(self, moves: int, num_spare: int) -> PrefetchBudget:
        """For one look at the queue: moves, and pool blocks that may be taken or kept for it."""
        specs = self._lower.specs
        staged = int(specs[CPU].capacity * _STAGED_SHARE) if {CPU, NVME} <= specs.keys() else 0
        return PrefetchBudget(moves, num_spare, staged)

    def look_anew(self) -> None:
        """A look at the whole queue begins: what only those wanted who were not seen in the last
        one is like any other block."""
        for seq_id, cursor in self._before.items():
            if seq_id not in self._cursors:
                self._give_up(cursor)
        self._before, self._cursors = self._cursors, {}

    def forget(self) -> None:
        """Nobody waits any more."""
        for cursor in [*self._before.values(), *self._cursors.values()]:
            self._give_up(cursor)
        self._before, self._cursors = {}, {}

    def _give_up(self, cursor: _Cursor) -> None:
        for block in cursor.wanted:
            self._pool.want(block, 0)

    def promote(self, seq: BlockHolder, budget: PrefetchBudget) -> int:
        """Begin to promote what a sequence will need: into the pool as far as there is room,
        else from NVMe to the CPU tier; returns how many moves began. Its keys are known."""
        cursor = self._cursor_of(seq)
        budget.pool -= cursor.places
        if self._walker.is_chained:
            self._pass_pooled(seq, cursor, budget)
        begun, index = 0, cursor.pooled
        while (block := self._walker.find(seq, index)) is not None:
            if GPU in block.copies:
                self._keep(block, cursor, budget)
            elif budget.moves <= begun or self._is_out_of_reach(seq, index, block):
                break
            elif budget.pool > 0 and self._pool.num_available > 0:
                if not self._arrives_in_order(block):
                    break
                begun += self._loads.prefetch(block)
                self._want(block, cursor, budget)
            elif budget.staged <= 0:
                break
            elif (end := self._end_of_staged(seq, index, cursor, budget)) > index:
                budget.staged -= end - index
                index = cursor.staged = end
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
        if cursor is None:
            cursor = _Cursor(next(self._numbers), self._walker.first_wanted(seq))
        elif not self._holds(seq, cursor):
            self._give_up(cursor)
            cursor = _Cursor(cursor.number, self._walker.first_wanted(seq))
        self._cursors[seq.seq_id] = cursor
        return cursor

    def _pass_pooled(self, seq: BlockHolder, cursor: _Cursor, budget: PrefetchBudget) -> None:
        """Go past what is in the pool, or on its way. Whoever keeps the last block there keeps its
        ancestors: leaves go first."""
        last: Block | None = None
        for block in self._walker.run_in(GPU, seq, cursor.pooled):
            cursor.pooled += 1
            if block.pins:
                continue
            if block.copies[GPU].state is CopyState.READY:
                last = block
                cursor.places += 1
                budget.pool -= 1
            else:
                self._want(block, cursor, budget)
        if last is not None:
            self._pool.want(last, wanted_by(cursor.number))
            cursor.wanted.append(last)

    def _end_of_staged(
        self, seq: BlockHolder, index: int, cursor: _Cursor, budget: PrefetchBudget
    ) -> int:
        """The first block from `index` on that has yet to come to the CPU tier, or is not to."""
        end, limit = max(index, cursor.staged), index + budget.staged
        for block in self._walker.run_in(CPU, seq, end):
            if end >= limit or GPU in block.copies or self._claims.is_claimed(seq, block.key):
                break
            end += 1
        return end

    def _holds(self, seq: BlockHolder, cursor: _Cursor) -> bool:
        """Whether the pool still has the last block that was there: leaves go first."""
        if not cursor.wanted:
            return True
        block = self._walker.find(seq, cursor.pooled - 1)
        return block is not None and GPU in block.copies

    def _keep(self, block: Block, cursor: _Cursor, budget: PrefetchBudget) -> None:
        if not block.pins:
            self._want(block, cursor, budget)

    def _want(self, block: Block, cursor: _Cursor, budget: PrefetchBudget) -> None:
        self._pool.want(block, wanted_by(cursor.number))
        cursor.wanted.append(block)
        cursor.places += 1
        budget.pool -= 1

    def _arrives_in_order(self, block: Block) -> bool:
        """Whether the pool will have its parent by the time that it has the block: without it the
        block would be dropped on arrival. What comes from one tier comes in order."""
        parent = block.parent
        if not self._walker.is_chained or parent is None or parent.depth < 0:
            return True
        source = self._loads.source_of(parent)
        return GPU in parent.copies and source in (None, lower_tier(block))

    def _is_out_of_reach(self, seq: BlockHolder, index: int, block: Block) -> bool:
        """It had to make room for blocks before it, or another sequence is computing it anew."""
        return lower_tier(block) is None or self._claims.is_claimed(seq, seq.block_keys[index])
