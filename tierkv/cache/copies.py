"""Copy on write: blocks that are continued by one sequence while others hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tierkv.cache.evictor import GPU
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefix_tree import Block
from tierkv.types import BlockCopy


@dataclass(slots=True)
class CopyBatch:
    """Copy-on-write work for one plan; its sources stay pinned until `Copies.finish`."""

    copies: list[BlockCopy] = field(default_factory=list)
    sources: list[Block] = field(default_factory=list)


class Copies:
    """Collects the copies of the plan that is being made.

    Args:
        pool: pins their sources.
    """

    def __init__(self, pool: PoolBlocks) -> None:
        self._pool = pool
        self._batch = CopyBatch()

    def add(self, source: Block, destination: Block, num_tokens: int) -> None:
        """Copy the first tokens of `source`, which the caller has pinned for this."""
        slots = source.copies[GPU].slot, destination.copies[GPU].slot
        self._batch.copies.append(BlockCopy(*slots, num_tokens))
        self._batch.sources.append(source)

    def num_from(self, source: Block) -> int:
        """Copies of `source` in the plan that is being made."""
        return self._batch.sources.count(source)

    def take(self) -> CopyBatch:
        """The copies since the last call; they belong into the next plan."""
        batch, self._batch = self._batch, CopyBatch()
        return batch

    def finish(self, batch: CopyBatch) -> None:
        """The copies come before whatever is done from now on: their sources may go."""
        for source in batch.sources:
            self._pool.unpin(source, None)
        batch.sources.clear()
