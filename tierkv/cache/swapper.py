"""Swapping sequences out and in: the part of it that is not ordinary cache.

Full blocks stay ordinary cache, in whatever tier. The partial block at the end becomes the
sequence's tail (`seq.tail`) and moves as a private block.
"""

from __future__ import annotations

from tierkv.cache.evictor import GPU
from tierkv.cache.holder import BlockHolder
from tierkv.cache.loads import Loads
from tierkv.cache.lookup import Match, lower_tier
from tierkv.cache.lower_tiers import LowerTiers
from tierkv.cache.moves import Moves
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState, Residency
from tierkv.cache.tails import Tails
from tierkv.types import MovePriority


class Swapper:
    """Sends what a sequence would lose down, and brings it back.

    Args:
        residency, moves, lower, loads, pool, tails: of the cache.
    """

    def __init__(
        self,
        residency: Residency,
        moves: Moves,
        lower: LowerTiers,
        loads: Loads,
        pool: PoolBlocks,
        tails: Tails,
    ) -> None:
        self._residency = residency
        self._moves = moves
        self._lower = lower
        self._loads = loads
        self._pool = pool
        self._tails = tails

    def send_down(self, seq: BlockHolder) -> Block | None:
        """Begin to move what the lower tiers lack; returns the tail, cut from the block table.

        There is no tail when the last block is full, when others share it, or when the tier below
        has no room or is far behind: then its tokens are computed again.
        """
        tail = self._send_tail(seq)
        self._lower.push(block for block in seq.blocks if block is not None)
        return tail

    def _send_tail(self, seq: BlockHolder) -> Block | None:
        block = seq.blocks[-1] if seq.blocks else None
        if block is None or block.in_tree or block.pins != 1 or len(block.copies) != 1:
            return None
        tier, is_full = self._lower.below_pool, seq.num_computed % self._lower.block_size == 0
        if is_full or not self._lower.has_budget(GPU, tier):
            return None
        if not self._lower.make_slot(tier, block):
            return None
        if block.copies[GPU].state is CopyState.FILLING:
            self._residency.commit_fill(block, GPU)
        self._moves.begin(block, GPU, tier, MovePriority.SWAP_OUT, is_drain=True)
        block.pins = 0
        seq.blocks.pop()
        seq.block_table.pop()
        self._tails.keep(block)
        return block

    def bring_back(self, seq: BlockHolder, match: Match) -> bool:
        """Load the sequence's tail behind the full blocks of `match`, if those reach it and it has
        arrived."""
        tail, seq.tail = seq.tail, None
        if tail is None:
            return False
        full = seq.tail_tokens // self._lower.block_size
        if len(match.blocks) != full or lower_tier(tail) is None:
            self._tails.give_up(tail)
            return False
        self._tails.take(tail)
        self._pool.pin(tail)
        if not match.num_loads:
            seq.load_from = full
        seq.load_tokens = seq.tail_tokens
        seq.num_computed = min(seq.num_computed, full * self._lower.block_size)
        seq.blocks.append(tail)
        self._loads.wait_for(seq, tail)
        seq.block_table.append(tail.copies[GPU].slot)
        return True

    def is_under_way(self, seq: BlockHolder) -> bool:
        """Whether the sequence's tail is still on its way down."""
        return seq.tail is not None and GPU in seq.tail.copies

    def num_blocks(self, seq: BlockHolder) -> tuple[int, int]:
        """Blocks that swapping the sequence would move down, and then up again."""
        held = [block for block in seq.blocks if block is not None and block.pins == 1]
        return sum(lower_tier(block) is None for block in held), len(held)
