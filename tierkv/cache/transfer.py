"""Blocks that come from outside: each enters the pool, and goes down at once.

One place of the pool is enough, so that a chain of any length can come while others compute. The
block goes to the first tier that has a place for it and holds its parent, or will.
"""

from __future__ import annotations

from tierkv.cache.evictor import GPU
from tierkv.cache.hashing import TOKEN_BYTES, block_key
from tierkv.cache.prefix_tree import Block
from tierkv.cache.shares import adopt_below
from tierkv.cache.tiered_cache import TieredCache
from tierkv.errors import RequestError
from tierkv.protocols import BlockPort
from tierkv.types import BlockKey, MovePriority, TierName


def take_in(
    cache: TieredCache,
    port: BlockPort,
    salt: str,
    key: BlockKey,
    parent: BlockKey,
    tokens: bytes,
    payload: bytes,
) -> str:
    """Make a block of the prefix tree from bytes.

    Returns:
        "taken"; "known" when it is there already; "busy" when there is no room just now; "lost"
        when its parent is gone, so that nobody could reach it.

    Raises:
        RequestError: the key is not that of these tokens after this parent.
    """
    if len(tokens) != TOKEN_BYTES * cache.block_size or block_key(parent, tokens) != key:
        raise RequestError("key", key.hex(), "is not that of these tokens after this parent")
    known, above = cache.tree.get(key), cache.tree.get(parent)
    if known is not None and known.copies:
        return "known"
    if parent != cache.tree.root_key(salt) and (above is None or not above.copies):
        return "lost"
    if not cache.pool.try_make_slot(spared=above):
        return "busy"
    block = cache.pool.new_block(above.depth + 1 if above is not None else 0)
    block.parent = above
    owner = above.owner if above is not None else cache.salts.get(salt)
    if owner is not None:
        cache.residency.own(block, owner)
    tier = _place(cache, block)
    if tier is None and cache.lower is not None:
        cache.pool.unpin(block, None)
        return "busy"
    port.write(block.copies[GPU].slot, payload)
    cache.tree.insert(block, key, above or cache.tree.ensure_root(salt), tokens)
    if block.owner is not None and block.children:
        adopt_below(block, block.owner, cache.evictors[GPU], cache.hint_of)
    cache.residency.commit_fill(block, GPU)
    cache.evictors[GPU].enter(block, cache.hint_of(block))
    cache.keeps.arrived(block)
    if cache.moves is not None and tier is not None:
        cache.moves.begin(block, GPU, tier, MovePriority.WRITE_BACK, is_drain=True)
    cache.pool.unpin(block, None)
    return "taken"


def _place(cache: TieredCache, block: Block) -> TierName | None:
    """The first tier below the pool that has room for the block, and its parent."""
    lower, moves = cache.lower, cache.moves
    if lower is None or moves is None:
        return None
    for tier in lower.specs:
        is_rooted = moves.has_parent_below(block, tier)
        if is_rooted and lower.has_budget(GPU, tier) and lower.make_slot(tier, block):
            return tier
    return None
