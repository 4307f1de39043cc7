"""Everything at once: taking in what a persistent tier held, and forgetting all."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from tierkv.cache.prefix_tree import Block
from tierkv.cache.tiered_cache import NVME, TieredCache
from tierkv.errors import InvariantError
from tierkv.policies.base import Why
from tierkv.storage.base import StoredBlock
from tierkv.types import BlockKey

_NEVER = (float("inf"), 0)


def recover(cache: TieredCache, stored: Sequence[StoredBlock]) -> int:
    """Put stored blocks into the tree, parents first; returns how many.

    Private tails of the process before are erased: nobody will come back for them. A block whose
    parent is not stored hangs under the parent's key: that is the root of its salt, or a block
    that was lost and is joined when it is computed again. What was used longest ago leaves first,
    as it would have without the restart.
    """
    if cache.moves is None:
        raise InvariantError("there is no tier to recover")
    kept = [item for item in stored if item.tokens]
    cache.moves.erase([item.slot for item in stored if not item.tokens])
    cache.residency.reserve(NVME, {item.slot for item in kept})
    by_parent: dict[BlockKey, list[StoredBlock]] = {}
    for item in kept:
        by_parent.setdefault(item.parent, []).append(item)
    keys = {item.key for item in kept}
    pending = [parent for parent in by_parent if parent not in keys]
    placed: list[tuple[Block, StoredBlock]] = []
    for parent in pending:
        node = cache.tree.find(parent) or cache.tree.add_root(parent)
        for item in by_parent[parent]:
            block = Block(item.key, 0)
            cache.tree.insert(block, item.key, node, item.tokens)
            cache.residency.recover(block, NVME, item.slot)
            placed.append((block, item))
            if item.key in by_parent:
                pending.append(item.key)
    _replay_uses(cache, placed)
    return len(kept)


def _replay_uses(cache: TieredCache, placed: Sequence[tuple[Block, StoredBlock]]) -> None:
    """Tell the eviction policy of the blocks, which come parents first, in the order of their uses.

    A block enters when the first of those that hang on it was used, because it enters before
    them, and is touched when it was used itself, if that was later or for another time.
    """
    first: dict[BlockKey, tuple[float, int]] = {}
    for _, item in reversed(placed):
        since = first[item.key] = min(first.get(item.key, _NEVER), (item.last_use, item.generation))
        first[item.parent] = min(first.get(item.parent, _NEVER), since)
    events: list[tuple[tuple[float, bool, int, int], Block]] = []
    for block, item in placed:
        entered, generation = first[item.key]
        events.append(((entered, False, generation, block.depth), block))
        if item.hits or item.last_use > entered:
            events.append(((item.last_use, True, 0, -block.depth), block))
    evictor = cache.evictors[NVME]
    for (_, is_touch, _, _), block in sorted(events, key=itemgetter(0)):
        tell = evictor.touch if is_touch else evictor.enter
        tell(block, cache.hint_of(block))
    evictor.take_touched()  # the store knows


def forget_all(cache: TieredCache) -> bool:
    """Drop every copy in every tier; False (and nothing happens) while blocks are held or move."""
    if cache.has_background_work or cache.num_available != cache.num_blocks:
        return False
    blocks = sorted(cache.tree, key=lambda block: -block.depth)
    for tier, evictor in cache.evictors.items():
        held = [block for block in blocks if tier in block.copies]
        if tier is NVME and cache.moves is not None:
            cache.moves.erase([block.copies[NVME].slot for block in held])
        for block in held:
            evictor.drop(block, Why.REMOVED)
    return True
