"""One tier and its eviction policy: what the policy is told, and what may leave.

A policy knows the READY copies of blocks in the prefix tree (they are *listed*), and which of them
may leave now. In the GPU pool the listed copies are closed under ancestry: a copy is listed once
its parent's is, so that "leaf first" can free as many blocks as are evictable, exactly. What a
lower tier holds may have its ancestors in another tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tierkv.cache.prefix_tree import Block, PrefixTree
from tierkv.cache.residency import CopyState, Residency
from tierkv.errors import InvariantError
from tierkv.policies.base import AccessHint, EvictionPolicy, Why
from tierkv.types import BlockKey, TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME


class TreeViewOf:
    """`TreeView` over the prefix tree."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree

    def parent(self, key: object) -> BlockKey | None:
        block = self._tree.get(key) if isinstance(key, bytes) else None
        parent = block.parent if block is not None else None
        return parent.key if parent is not None and parent.depth >= 0 else None

    def children(self, key: object) -> Iterator[BlockKey]:
        block = self._tree.get(key) if isinstance(key, bytes) else None
        return iter([c.key for c in block.children.values()] if block is not None else [])


class Evictor:
    """The eviction policy of one tier, kept up to date.

    Args:
        tier: whose copies.
        policy: ranks them.
        tree, residency: where blocks and states are.
        is_chained: copies go leaf first (False when every layer has a window: then blocks are
            held without their ancestors).
    """

    def __init__(
        self,
        tier: TierName,
        policy: EvictionPolicy,
        tree: PrefixTree,
        residency: Residency,
        *,
        is_chained: bool,
    ) -> None:
        self.tier = tier
        self.num_evictable = 0
        self.num_evicted = 0
        self._policy = policy
        self._tree = tree
        self._view = TreeViewOf(tree)
        self._residency = residency
        self._is_chained = is_chained

    # ------------------------------------------------------------------ what the policy is told

    def enter(self, block: Block, hint: AccessHint) -> None:
        """The block, which is in the tree, has a READY copy here."""
        parent = block.parent if self._is_chained else None
        key = None
        if parent is not None and parent.depth >= 0:
            above = parent.copies.get(self.tier)
            if above is not None and above.is_listed:
                key = parent.key
            elif self.tier is GPU:
                return  # it follows its parent
        block.copies[self.tier].is_listed = True
        self._policy.insert(block.key, key, hint)
        self.refresh(block)
        if self.tier is GPU and self._is_chained and block.children:
            self._enter_children(block, hint)

    def _enter_children(self, block: Block, hint: AccessHint) -> None:
        """Copies that were ready before their parent's."""
        pending = list(block.children.values())
        while pending:
            child = pending.pop()
            copy = child.copies.get(self.tier)
            if copy is not None and copy.state is CopyState.READY and not copy.is_listed:
                copy.is_listed = True
                assert child.parent is not None
                self._policy.insert(child.key, child.parent.key, hint)
                self.refresh(child)
                pending.extend(child.children.values())

    def touch(self, block: Block, hint: AccessHint) -> None:
        """The block was used."""
        copy = block.copies.get(self.tier)
        if copy is not None and copy.is_listed:
            self._policy.touch(block.key, hint)

    def leave(self, block: Block, why: Why) -> None:
        """The copy is about to be dropped or drained."""
        copy = block.copies[self.tier]
        if copy.is_listed:
            copy.is_listed = False
            if copy.is_evictable:
                copy.is_evictable = False
                self.num_evictable -= 1
            self._policy.forget(block.key, why)

    def refresh(self, block: Block) -> None:
        """Tell the policy if what it believes of the copy has changed."""
        copy = block.copies[self.tier]
        free = copy.is_listed and not copy.readers
        if self.tier is GPU:
            free = free and not (block.pins or block.busy)
        if free is not copy.is_evictable:
            copy.is_evictable = free
            self.num_evictable += 1 if free else -1
            self._policy.set_evictable(block.key, free)

    # ------------------------------------------------------------------ who may leave

    def victims(self, n: int, candidate: BlockKey | None = None) -> list[Block]:
        """Up to `n` blocks whose copies may be dropped now, cheapest loss first."""
        found = []
        for key in self._policy.propose(n, self._view, candidate):
            block = self._tree.get(key) if isinstance(key, bytes) else None
            copy = block.copies.get(self.tier) if block is not None else None
            if block is None or copy is None or not copy.is_evictable:
                raise InvariantError(f"the eviction policy proposed {key!r}, which is not free")
            found.append(block)
        return found

    def is_missed(self, block: Block) -> bool:
        """Dropping this copy from a lower tier would cut off a child that has one."""
        if not self._is_chained or not block.children:
            return False
        if self.tier is CPU:
            return NVME not in block.copies and _has_child_in(block, CPU)
        return _has_child_in(block, NVME) or (CPU not in block.copies and _has_child_in(block, CPU))

    def drop(self, block: Block, why: Why) -> None:
        """Drop the copy, and the node if nothing else needs it."""
        self.leave(block, why)
        self._residency.drop(block, self.tier)
        if why is Why.EVICTED:
            self.num_evicted += 1
        self.prune(block)

    def prune(self, block: Block) -> None:
        """Let go of the node unless something needs it."""
        if block.in_tree:
            self._tree.prune(block)


def _has_child_in(block: Block, tier: TierName) -> bool:
    return any(tier in child.copies for child in block.children.values())


Hinter = Callable[[Block], AccessHint]
"""Makes the hint of an access that no request is behind (a move)."""
