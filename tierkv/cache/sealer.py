"""Making computed blocks public: from a sequence's own block to one that others find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tierkv.cache.evictor import GPU, Evictor
from tierkv.cache.hashing import pack_tokens
from tierkv.cache.holder import BlockHolder
from tierkv.cache.lookup import is_in_pool
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefix_tree import Block, PrefixTree
from tierkv.cache.residency import CopyState, Residency
from tierkv.cache.shares import Share, adopt_below
from tierkv.policies.base import AccessHint


class Sealer:
    """Puts full blocks into the tree.

    Args:
        tree, residency, evictor, pool: of the cache; the evictor is the pool's.
        rescue: keeps a pool copy that was on its way down.
        published: is told of every block that others may use from now on.
    """

    def __init__(
        self,
        tree: PrefixTree,
        residency: Residency,
        evictor: Evictor,
        pool: PoolBlocks,
        rescue: Callable[[Block], None],
        published: Callable[[Block, AccessHint], None],
    ) -> None:
        self._tree = tree
        self._block_size = tree.block_size
        self._residency = residency
        self._evictor = evictor
        self._pool = pool
        self._rescue = rescue
        self._published = published

    def try_seal(self, seq: BlockHolder, index: int, hint: AccessHint) -> bool:
        """Make a full block public; False while the same block is being loaded for others."""
        block, key = seq.blocks[index], seq.block_keys[index]
        if block is None or block.in_tree:
            return True
        known = self._tree.get(key)
        if known is not None and known.copies:
            if is_in_pool(known):
                self._share(seq, index, known)
                return True
            if GPU in known.copies or block.pins != 1:
                return False
            self._adopt(seq, index, known, hint)
            return True
        if known is not None and known.busy:
            self._pool.hold_alone(known)  # a ghost whose place is taken by a pinned block
        start = index * self._block_size
        tokens = pack_tokens(seq.token_ids[start : start + self._block_size])
        parent = self._parent_of(seq, index)
        self._tree.insert(block, key, parent, tokens)
        self._share_around(block, block.owner, hint)
        self._publish(block, hint)
        return True

    def _share_around(self, block: Block, owner: Share | None, hint: AccessHint) -> None:
        """The block and what it hangs on, if they are nobody's, become the owner's; so does what
        was recovered without its parent, and has found it."""
        if owner is None:
            return
        hint_of = partial(_at_depth_of, hint)
        top, nodes = block, [block]
        while top.parent is not None and top.parent.owner is None:
            top = top.parent
            nodes.append(top)
        for node in nodes:
            if node.owner is None:
                self._evictor.own(node, owner, hint_of)
        if top.children:
            adopt_below(top, owner, self._evictor, hint_of)

    def _publish(self, block: Block, hint: AccessHint) -> None:
        """The block's pool copy is complete and in the tree: others may use it, or copy it."""
        if block.copies[GPU].state is CopyState.FILLING:
            self._residency.commit_fill(block, GPU)
        self._evictor.enter(block, hint)
        self._published(block, hint)

    def _adopt(self, seq: BlockHolder, index: int, known: Block, hint: AccessHint) -> None:
        """The block is known in a lower tier only: our copy becomes its copy in the pool."""
        own = seq.blocks[index]
        assert own is not None
        self._residency.adopt(own, known, GPU)
        self._share_around(known, own.owner, hint)
        self._pool.pin(known)
        own.pins = 0
        seq.blocks[index] = known
        self._publish(known, hint)

    def _share(self, seq: BlockHolder, index: int, known: Block) -> None:
        """Another sequence computed the same block first: use that one and free our own."""
        own = seq.blocks[index]
        self._pool.pin(known)
        self._rescue(known)
        seq.blocks[index] = known
        seq.block_table[index] = known.copies[GPU].slot
        seq.table_version += 1
        if own is not None:
            self._pool.unpin(own, None)

    def _parent_of(self, seq: BlockHolder, index: int) -> Block:
        """The tree node before block `index`; ghosts are made where the path has gone."""
        if index == 0:
            root = self._tree.ensure_root(seq.cache_salt)
            if seq.owner is not None and not root.children:
                root.owner = seq.owner
            return root
        before = seq.blocks[index - 1]
        if before is not None and before.in_tree:
            return before
        missing = index - 1
        while missing > 0 and self._tree.get(seq.block_keys[missing - 1]) is None:
            missing -= 1
        node = self._tree.get(seq.block_keys[missing - 1]) if missing else None
        node = node or self._tree.ensure_root(seq.cache_salt)
        for i in range(missing, index):
            known = self._tree.get(seq.block_keys[i])
            packed = pack_tokens(seq.token_ids[i * self._block_size : (i + 1) * self._block_size])
            node = known or self._tree.insert_ghost(seq.block_keys[i], node, packed)
        return node


def _at_depth_of(hint: AccessHint, block: Block) -> AccessHint:
    return replace(hint, depth=block.depth)
