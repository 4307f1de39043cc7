"""Who computes what: so that two requests with the same uncomputed prefix compute it once."""

from __future__ import annotations

from functools import partial
from itertools import takewhile

from tierkv.cache.holder import BlockHolder
from tierkv.types import BlockKey


class Claims:
    """Keys of full blocks that running sequences are about to compute."""

    def __init__(self) -> None:
        self._owners: dict[BlockKey, BlockHolder] = {}

    def is_claimed(self, seq: BlockHolder, key: BlockKey) -> bool:
        """Whether a sequence other than `seq` is about to compute the block."""
        owner = self._owners.get(key)
        return owner is not None and owner is not seq

    def num_pending(self, seq: BlockHolder, first: int) -> int:
        """How many of its blocks from `first` on, without a gap, others are about to compute."""
        return sum(1 for _ in takewhile(partial(self.is_claimed, seq), seq.block_keys[first:]))

    def claim(self, seq: BlockHolder, block_size: int) -> None:
        """Tell others which of its known full blocks this sequence will compute: all but those
        that are sealed, or being loaded for it."""
        loaded = range(seq.load_from, seq.load_tokens // block_size)
        for index in range(seq.num_sealed, len(seq.block_keys)):
            if index not in loaded:
                self._owners.setdefault(seq.block_keys[index], seq)

    def drop(self, seq: BlockHolder, key: BlockKey) -> None:
        """The block is computed, or the sequence will not compute it."""
        if self._owners.get(key) is seq:
            del self._owners[key]
