"""One tier and its eviction policy: what the policy is told, and what may leave.

A policy knows the READY copies of blocks in the prefix tree (they are *listed*), and which of them
may leave now. In the GPU pool the listed copies are closed under ancestry: a copy is listed once
its parent's is, so that "leaf first" can free as many blocks as are evictable, exactly. What a
lower tier holds may have its ancestors in another tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tierkv.cache.hints import BlockCosts, HintMaker
from tierkv.cache.kept import is_bound, retention
from tierkv.cache.prefix_tree import Block, Copy, PrefixTree
from tierkv.cache.residency import CopyState, Residency
from tierkv.cache.shares import Share
from tierkv.errors import InvariantError
from tierkv.policies.base import AccessHint, EvictionPolicy, Why
from tierkv.policies.shares import TenantShares
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
        peers: the evictors of all tiers; of a marked block that comes or goes they are told.
        is_chained: copies go leaf first (False when every layer has a window: then blocks are
            held without their ancestors).
        costs: for policies that weigh what a block costs.

    Attributes:
        touched: of the persistent tier, slots of blocks used since `take_touched`.
        num_unused: prefetched copies that left the tier before anyone used them.
        left_slots: of the persistent tier, those where a dropped copy's bytes may still be.
        policy: ranks them; where tenants have quotas it is `shares`, around what was given.
    """

    def __init__(
        self,
        tier: TierName,
        policy: EvictionPolicy,
        tree: PrefixTree,
        residency: Residency,
        peers: Mapping[TierName, Evictor],
        is_chained: bool,
        costs: BlockCosts | None = None,
    ) -> None:
        self.tier = tier
        self.num_evictable = 0
        self.num_evicted = 0
        self.num_unused = 0
        self.left_slots: set[int] = set()
        self.touched: set[int] = set()
        self.policy = policy
        self.shares: TenantShares | None = None
        self._costs = costs if policy.uses_cost else None
        self._tree = tree
        self._view = TreeViewOf(tree)
        self._residency = residency
        self._is_chained = is_chained
        self._peers = peers

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
        self._list(block, key, hint)
        if self.tier is GPU and self._is_chained and block.children:
            self._enter_children(block, hint)

    def _enter_children(self, block: Block, hint: AccessHint) -> None:
        """Copies that were ready before their parent's."""
        pending = list(block.children.values())
        while pending:
            child = pending.pop()
            copy = child.copies.get(self.tier)
            if copy is not None and copy.state is CopyState.READY and not copy.is_listed:
                assert child.parent is not None
                self._list(child, child.parent.key, hint)
                pending.extend(child.children.values())

    def _list(self, block: Block, parent: BlockKey | None, hint: AccessHint) -> None:
        block.copies[self.tier].is_listed = True
        self.policy.insert(block.key, parent, self._priced(block, hint))
        self.refresh(block)
        if block.kept is not None:
            self._renew_all(block)
        elif block.copies[self.tier].wanted:
            self.renew(block)

    def touch(self, block: Block, hint: AccessHint) -> None:
        """The block was used."""
        copy = block.copies.get(self.tier)
        if copy is not None and copy.is_listed:
            self.policy.touch(block.key, self._priced(block, hint))
            if self.tier is NVME and not hint.ends_use:
                self.touched.add(copy.slot)

    def touch_chain(self, blocks: Sequence[Block], hint_of: HintMaker) -> None:
        """Blocks of one chain, deepest first, were used; a policy that can is told once."""
        touch = getattr(self.policy, "touch_chain", None)
        if touch is None:
            for block in blocks:
                self.touch(block, hint_of(block.depth))
            return
        tier = self.tier
        for hint, part in hint_of.parts(blocks):
            listed = [b for b in part if (c := b.copies.get(tier)) is not None and c.is_listed]
            touch([block.key for block in listed], hint)
            if tier is NVME and not hint.ends_use:
                self.touched.update(block.copies[NVME].slot for block in listed)

    def take_touched(self) -> set[int]:
        """Slots of blocks used since the last call."""
        touched, self.touched = self.touched, set()
        return touched

    def _priced(self, block: Block, hint: AccessHint) -> AccessHint:
        return hint if self._costs is None else self._costs.priced(hint, block, self.tier)

    def leave(self, block: Block, why: Why) -> None:
        """The copy is about to be dropped or drained."""
        copy = block.copies[self.tier]
        if copy.is_prefetched:
            copy.is_prefetched = False
            self.num_unused += 1
        if copy.is_listed:
            copy.is_listed = False
            if copy.is_evictable:
                copy.is_evictable = False
                self.num_evictable -= 1
            self.policy.forget(block.key, why)

    def refresh(self, block: Block) -> None:
        """Tell the policy if what it believes of the copy has changed."""
        copy = block.copies[self.tier]
        free = copy.is_listed and not copy.readers
        if self.tier is GPU:
            free = free and not (block.pins or block.busy)
        elif block.kept is not None:
            free = free and not is_bound(block, self.tier)
        if free is not copy.is_evictable:
            copy.is_evictable = free
            self.num_evictable += 1 if free else -1
            self.policy.set_evictable(block.key, free)

    def refresh_all(self, held: Iterable[tuple[Block, Copy]]) -> None:
        """The same for blocks of the pool and their copies there."""
        tell, change = self.policy.set_evictable, 0
        for block, copy in held:
            free = copy.is_listed and not (copy.readers or block.pins or block.busy)
            if free is not copy.is_evictable:
                copy.is_evictable = free
                change += 1 if free else -1
                tell(block.key, free)
        self.num_evictable += change

    def renew(self, block: Block) -> None:
        """How long the block is wanted has changed, or where its other copies are."""
        if block.copies[self.tier].is_listed:
            self.policy.set_retention(block.key, retention(block, self.tier))
            self.refresh(block)

    def want(self, block: Block, wanted: int) -> None:
        """How much the copy is to be kept for a waiting sequence, 0 for not at all."""
        copy = block.copies.get(self.tier)
        if copy is not None and copy.wanted != wanted:
            copy.wanted = wanted
            self.renew(block)

    def _renew_all(self, block: Block) -> None:
        for tier in block.copies:
            self._peers[tier].renew(block)

    def own(self, block: Block, owner: Share, hint_of: Hinter) -> None:
        """The block is `owner`'s from now on, in every tier."""
        self._residency.own(block, owner)
        for tier in block.copies:
            self._peers[tier].adopt(block, hint_of(block))

    def adopt(self, block: Block, hint: AccessHint) -> None:
        """The block, which is here already, has got an owner; its parent has had one."""
        copy = block.copies[self.tier]
        if self.shares is None or not copy.is_listed:
            return
        self.shares.adopt(
            block.key,
            block.parent.key if block.parent is not None else None,
            self._priced(block, hint),
            evictable=copy.is_evictable,
            retention=retention(block, self.tier),
        )

    # ------------------------------------------------------------------ what moves hold

    def hold_above(self, block: Block) -> None:
        """The block is busy and has no pin: its ancestors cannot leave the pool before it. (Those
        of a pinned block are pinned themselves.)"""
        node = self._above(block)
        while node is not None:
            node.busy += 1
            if node.busy > 1:
                return
            self.settle(node)
            node = self._above(node)

    def let_go_above(self, block: Block) -> list[Block]:
        """The block is busy no more, or is about to be pinned; returns ancestors that have become
        idle, for `settle`."""
        idle: list[Block] = []
        node = self._above(block)
        while node is not None:
            node.busy -= 1
            if node.busy:
                break
            idle.append(node)
            node = self._above(node)
        return idle

    def _above(self, block: Block) -> Block | None:
        return block.parent if self._is_chained and block.in_tree and not block.pins else None

    def settle(self, node: Block) -> None:
        """Tell the pool's policy whether the copy may leave, or drop what nobody can reach."""
        copy = node.copies.get(self.tier)
        if copy is None or not node.in_tree or copy.state is not CopyState.READY:
            return
        if copy.is_listed or node.busy or node.pins:
            self.refresh(node)
        else:
            self.drop(node, Why.REMOVED)

    # ------------------------------------------------------------------ who may leave

    def victims(
        self, n: int, candidate: BlockKey | None = None, owner: Share | None = None
    ) -> list[Block]:
        """Up to `n` blocks whose copies may be dropped now, cheapest loss first; with an owner, of
        its own."""
        if owner is None or self.shares is None:
            keys = self.policy.propose(n, self._view, candidate)
        else:
            keys = self.shares.propose_own(owner.tenant, n, self._view)
        found = []
        for key in keys:
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
        if self.tier is NVME:
            self.left_slots.add(block.copies[NVME].slot)
        self._residency.drop(block, self.tier)
        if why is Why.EVICTED:
            self.num_evicted += 1
        if block.kept is not None:
            self._renew_all(block)
        self.prune(block)

    def prune(self, block: Block) -> None:
        """Let go of the node unless something needs it."""
        if block.in_tree:
            self._tree.prune(block)


def _has_child_in(block: Block, tier: TierName) -> bool:
    return any(tier in child.copies for child in block.children.values())


Hinter = Callable[[Block], AccessHint]
"""Makes the hint of an access that no request is behind (a move)."""
