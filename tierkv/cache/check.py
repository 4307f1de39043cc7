"""The conservation laws of the cache, checked in full: after every step in tests, when idle in
production. Each check names the law it found broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tierkv.cache.holder import BlockHolder
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState
from tierkv.cache.tiered_cache import GPU, TieredCache, held_blocks
from tierkv.errors import InvariantError


def check_cache(cache: TieredCache, sequences: Sequence[BlockHolder]) -> None:
    """Raise InvariantError unless every law holds.

    Args:
        sequences: all that may hold blocks (no copy-on-write may be in flight).
    """
    held = held_blocks(sequences)
    blocks = {id(block): block for block in [*cache.tree, *held]}
    _check_slots(cache, list(blocks.values()))
    _check_pins(list(blocks.values()), held)
    _check_evictable(cache)
    _check_tree(cache)
    _check_tables(cache, sequences)


def _require(law: bool, message: str) -> None:
    if not law:
        raise InvariantError(message)


def _check_slots(cache: TieredCache, blocks: list[Block]) -> None:
    """empty + filling + ready + draining == capacity, and no slot has two owners."""
    for name, tier in cache.residency.tiers.items():
        copies = [block.copies[name] for block in blocks if name in block.copies]
        states = Counter(copy.state for copy in copies)
        for state in (CopyState.FILLING, CopyState.READY, CopyState.DRAINING):
            _require(tier.counts[state] == states[state], f"{name.value}: {state} miscounted")
        _require(tier.counts[CopyState.EMPTY] == tier.num_empty, f"{name.value}: empty miscounted")
        slots = [copy.slot for copy in copies] + tier.empty_slots
        _require(sorted(slots) == list(range(tier.capacity)), f"{name.value}: a slot leaked")


def _check_pins(blocks: list[Block], held: list[Block]) -> None:
    """A block is pinned once for every sequence that holds it."""
    holders = Counter(id(block) for block in held)
    for block in blocks:
        _require(block.pins == holders[id(block)], f"block {block.key.hex()}: pins miscounted")


def _check_evictable(cache: TieredCache) -> None:
    free = sum(1 for b in cache.tree if b.pins == 0 and cache.residency.is_ready(b, GPU))
    _require(cache.num_evictable == free, "evictable blocks miscounted")


def _check_tree(cache: TieredCache) -> None:
    """Links agree both ways; without a window every block with a copy is reachable."""
    for block in cache.tree:
        parent = block.parent
        _require(block.in_tree and cache.tree.get(block.key) is block, "index and node disagree")
        if parent is None:
            raise InvariantError(f"block {block.key.hex()} has no parent")
        _require(parent.children.get(block.tokens) is block, "parent does not know its child")
        _require(parent.depth + 1 == block.depth, "depths disagree")
        _require(bool(block.copies or block.pins or block.children), "a dead node was kept")
        if cache.window is None and parent.depth >= 0:
            _require(GPU in parent.copies, "a block is unreachable: its parent has no copy")
    for node in [*cache.tree, *cache.tree.roots]:
        order = node.sorted_children
        _require(order is None or order == sorted(node.children), "sorted children disagree")


def _check_tables(cache: TieredCache, sequences: Sequence[BlockHolder]) -> None:
    """Block tables say where the blocks are, and cover exactly the computed tokens."""
    for seq in sequences:
        slots = [b.copies[GPU].slot if b is not None else 0 for b in seq.blocks]
        _require(slots == seq.block_table, f"sequence {seq.seq_id}: its block table is wrong")
        need = cache.blocks_for(seq.num_computed)
        _require(len(seq.blocks) == need, f"sequence {seq.seq_id}: {len(seq.blocks)} != {need}")
