"""What of a sequence is cached, and where: the walk from the root through all tiers.

In the pool the cached blocks of a sequence are a prefix of it; further blocks may be on their way
(FILLING, a load) or lie in a lower tier. The walk stops at the first block that has no copy.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from tierkv.cache.evictor import GPU
from tierkv.cache.hashing import pack_tokens
from tierkv.cache.holder import BlockHolder
from tierkv.cache.prefix_tree import Block, PrefixTree
from tierkv.cache.residency import CopyState, copy_below
from tierkv.types import TierName


class Lookup(enum.Enum):
    """What a lookup answers about the first block that it does not find."""

    MISS = "miss"  # compute it
    PENDING = "pending"  # another running sequence is computing it: wait


@dataclass(slots=True)
class Match:
    """What of a sequence's tokens is cached.

    Attributes:
        blocks: the leading full blocks; None where a window makes the block unnecessary.
        num_loads: how many of them are not in the pool (without windows: the last ones).
        num_tokens: tokens that can be reused without a load, partial block included.
        partial: a block whose first tokens match, and how many; it is copied and continued.
        next: what is known of the first missing block.
    """

    blocks: list[Block | None] = field(default_factory=list)
    num_loads: int = 0
    num_tokens: int = 0
    partial: tuple[Block, int] | None = None
    next: Lookup = Lookup.MISS

    def cut(self, num_blocks: int, block_size: int) -> Match:
        """Without windows: no partial block, and no block from `num_blocks` on."""
        ready = min(len(self.blocks) - self.num_loads, num_blocks)
        blocks = self.blocks[:num_blocks]
        return Match(blocks, len(blocks) - ready, ready * block_size)


def is_in_pool(block: Block) -> bool:
    """Whether the pool has its bytes (perhaps on their way down, and to be rescued)."""
    copy = block.copies.get(GPU)
    return copy is not None and (
        copy.state is CopyState.READY or (copy.state is CopyState.DRAINING and block.in_tree)
    )


def lower_tier(block: Block) -> TierName | None:
    """The nearest lower tier with a READY copy."""
    return copy_below(block, GPU)


def is_partly_loading(match: Match) -> bool:
    """Whether some of the match is on its way into the pool already."""
    copies = [block.copies.get(GPU) for block in match.blocks if block is not None]
    return any(copy is not None and copy.state is CopyState.FILLING for copy in copies)


def loads_by_tier(match: Match) -> Counter[TierName]:
    """How many blocks of a match have to come from where."""
    missing = [b for b in match.blocks if b is not None and GPU not in b.copies]
    return Counter(tier for tier in map(lower_tier, missing) if tier is not None)


class Walker:
    """Walks the tree for a sequence.

    Args:
        tree: where blocks are.
        block_size: tokens per block.
        window: see `TieredCache`.

    Attributes:
        stalled: tiers that do not answer now; kept up to date by whoever knows.
    """

    def __init__(self, tree: PrefixTree, block_size: int, window: int | None) -> None:
        self._tree = tree
        self._block_size = block_size
        self._window = window
        self.stalled: Container[TierName] = ()

    def walk(self, seq: BlockHolder, *, use_lower: bool = True) -> Match:
        """The full blocks; at least the sequence's last token is left to compute.

        Args:
            seq: whose tokens.
            use_lower: whether blocks that would have to be loaded count.
        """
        limit = (len(seq.token_ids) - 1) // self._block_size
        if self._window is not None:
            return self._walk_windowed(seq, limit, use_lower=use_lower)
        match, get = Match(), self._tree.get
        for key in seq.block_keys[:limit]:
            block = get(key)
            if block is None:
                break
            copy = block.copies.get(GPU)
            is_ready = copy is not None and copy.state is CopyState.READY
            if match.num_loads or not (is_ready or is_in_pool(block)):
                if not use_lower or not self.can_load(block):
                    break
                match.num_loads += 1
            match.blocks.append(block)
        match.num_tokens = (len(match.blocks) - match.num_loads) * self._block_size
        return match

    @property
    def is_chained(self) -> bool:
        """Whether a block is of use only with all its ancestors."""
        return self._window is None

    def first_wanted(self, seq: BlockHolder) -> int:
        """The first block of what `walk` would find now; with a window others come before it."""
        if self._window is None:
            return 0
        blocks = self.walk(seq).blocks
        return next((i for i, block in enumerate(blocks) if block is not None), 0)

    def find(self, seq: BlockHolder, index: int) -> Block | None:
        """One block of those that `walk` could find; None beyond its end, or when it is not known
        or cannot be had. The keys are known."""
        if index >= min(len(seq.block_keys), (len(seq.token_ids) - 1) // self._block_size):
            return None
        block = self._tree.get(seq.block_keys[index])
        return block if block is not None and self.can_load(block) else None

    def run_in(self, tier: TierName, seq: BlockHolder, index: int) -> Iterator[Block]:
        """The blocks from `index` on that `walk` could find and that have a copy in `tier`, or get
        one; up to the first that has none."""
        keys = seq.block_keys
        limit = min(len(keys), (len(seq.token_ids) - 1) // self._block_size)
        for at in range(index, limit):
            block = self._tree.get(keys[at])
            if block is None or tier not in block.copies:
                return
            yield block

    def can_load(self, block: Block) -> bool:
        """Whether the block is on its way into the pool, or could be."""
        if GPU in block.copies:
            return True
        tier = lower_tier(block)
        return tier is not None and tier not in self.stalled

    def _walk_windowed(self, seq: BlockHolder, limit: int, *, use_lower: bool) -> Match:
        known = [self._tree.get(key) for key in seq.block_keys[:limit]]
        pooled = [b if b is not None and is_in_pool(b) else None for b in known]
        match = self._longest(pooled)
        if use_lower:
            usable = [b if b is not None and self.can_load(b) else None for b in known]
            longer = self._longest(usable)
            if len(longer.blocks) > len(match.blocks):
                longer.num_tokens = match.num_tokens
                longer.num_loads = sum(b is not None and not is_in_pool(b) for b in longer.blocks)
                return longer
        return match

    def _longest(self, usable: list[Block | None]) -> Match:
        """The longest prefix all of whose blocks *within the window* of its end are usable."""
        run = best = 0  # usable blocks in a row, ending before `depth`
        for depth, block in enumerate(usable, start=1):
            run = run + 1 if block is not None else 0
            if run >= depth - self.first_needed(depth * self._block_size):
                best = depth
        first = self.first_needed(best * self._block_size) if best else 0
        blocks = [block if i >= first else None for i, block in enumerate(usable[:best])]
        return Match(blocks, 0, best * self._block_size)

    def first_needed(self, position: int) -> int:
        """The first block that a query at `position` (or later) may look at."""
        if self._window is None:
            return 0
        return max(0, position - self._window + 1) // self._block_size

    def add_partial(self, seq: BlockHolder, match: Match) -> None:
        """Extend a match that needs no load by a part of one more block."""
        start = len(match.blocks) * self._block_size
        end = min(start + self._block_size, len(seq.token_ids) - 1)
        last = match.blocks[-1] if match.blocks else self._tree.root(seq.cache_salt)
        if end <= start or last is None or not last.children:
            return
        best = self._tree.best_partial(last, pack_tokens(seq.token_ids[start:end]), GPU)
        if best is not None and is_in_pool(best[0]):
            match.partial = best
            match.num_tokens = start + best[1]
