"""Blocks in the GPU pool: slots for new ones, pins of those in use, eviction of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tierkv.cache.evictor import GPU, Evictor
from tierkv.cache.hashing import private_key
from tierkv.cache.hints import HintMaker
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState, Residency
from tierkv.cache.shares import Share
from tierkv.cache.tails import Tails
from tierkv.errors import InvariantError
from tierkv.policies.base import AccessHint, Why

_MOST_TRIES = 16


class PoolBlocks:
    """Holds and frees blocks of the pool.

    Args:
        residency, evictor: states of all tiers, and the pool's eviction policy.
        tails: takes private blocks that a move still uses.
        before_eviction: is told which copies are about to be dropped.

    Attributes:
        num_prefetched_used: prefetched copies that were there when they were first wanted.
    """

    def __init__(
        self,
        residency: Residency,
        evictor: Evictor,
        tails: Tails,
        before_eviction: Callable[[list[Block]], None],
    ) -> None:
        self._residency = residency
        self._evictor = evictor
        self._tails = tails
        self._before_eviction = before_eviction
        self._slots = residency.tiers[GPU]
        self.num_prefetched_used = 0

    @property
    def num_available(self) -> int:
        """Blocks that could be allocated now: empty, or cached and evictable."""
        return len(self._slots.empty_slots) + self._evictor.num_evictable

    def new_block(self, depth: int, owner: Share | None = None) -> Block:
        """A private block with a slot, pinned once. The caller has checked `num_available`."""
        self.make_slot(owner)
        block = Block(private_key(), depth)
        block.pins, block.owner = 1, owner
        self._residency.begin_fill(block, GPU)
        return block

    def make_slot(self, owner: Share | None = None) -> None:
        """Have at least one EMPTY slot; an owner at its quota gives up a copy for it if it can."""
        if owner is not None and owner.is_full(GPU):
            self._give_up(1, owner)
        if not self._slots.empty_slots:
            self.evict(1, Why.EVICTED)

    def evict(self, n: int, why: Why) -> None:
        """Drop the `n` cached copies that the policy values least."""
        victims = self._evictor.victims(n)
        if len(victims) < n:
            raise InvariantError(f"{n} blocks to evict, the policy proposed {len(victims)}")
        self._before_eviction(victims)
        for block in victims:
            self._evictor.drop(block, why)

    def try_make_slot(self, spared: Block | None) -> bool:
        """Have an EMPTY slot without touching the chain that ends in `spared`, if there is one."""
        if self._slots.empty_slots:
            return True
        for victim in self._evictor.victims(_MOST_TRIES):
            if victim is not spared and not _has_child_here(victim):
                self._before_eviction([victim])
                self._evictor.drop(victim, Why.EVICTED)
                return True
        return False

    def trim(self, owner: Share) -> None:
        """What an owner has too much, now that nobody holds it, goes."""
        if (excess := owner.num_over(GPU)) > 0:
            self._give_up(excess, owner)

    def _give_up(self, n: int, owner: Share) -> None:
        victims = self._evictor.victims(n, owner=owner)
        self._before_eviction(victims)
        for block in victims:
            if not _has_child_here(block):
                self._evictor.drop(block, Why.EVICTED)

    def want(self, block: Block, wanted: int) -> None:
        """A waiting sequence will use the block, or (0) will not after all."""
        self._evictor.want(block, wanted)

    def pin(self, block: Block) -> None:
        """One more holder."""
        if block.busy and not block.pins:
            self.hold_alone(block)
        block.pins += 1
        copy = block.copies.get(GPU)
        if block.pins == 1 and block.in_tree and copy is not None:
            if copy.is_prefetched and copy.is_listed:
                copy.is_prefetched = False
                self.num_prefetched_used += 1
            if copy.wanted:
                self._evictor.want(block, 0)
            self._evictor.refresh(block)

    def pin_all(self, blocks: Iterable[Block]) -> None:
        """One more holder of each."""
        held = []
        for block in blocks:
            copy = block.copies.get(GPU)
            if block.pins:
                block.pins += 1
            elif block.busy or copy is None or copy.is_prefetched or copy.wanted:
                self.pin(block)
            else:
                block.pins = 1
                held.append((block, copy))
        self._evictor.refresh_all(held)

    def unpin_chain(self, blocks: Sequence[Block], hint_of: HintMaker) -> None:
        """The use of a chain's blocks ends, deepest first: one holder fewer of each."""
        self._evictor.touch_chain([block for block in blocks if block.in_tree], hint_of)
        let_go = []
        for block in blocks:
            copy = block.copies.get(GPU)
            if block.pins > 1:
                block.pins -= 1
            elif block.pins and copy is not None and copy.is_listed and not block.busy:
                block.pins = 0
                let_go.append((block, copy))
            else:
                self.unpin(block, None)
        self._evictor.refresh_all(let_go)

    def hold_alone(self, block: Block) -> None:
        """A busy block gets its first pin: its ancestors have, or get, one of their own."""
        for node in self._evictor.let_go_above(block):
            self._evictor.settle(node)

    def unpin(self, block: Block, hint: AccessHint | None) -> None:
        """One holder fewer; a private block without one is freed."""
        if block.pins <= 0:
            raise InvariantError(f"block {block.key.hex()} is unpinned too often")
        block.pins -= 1
        if not block.in_tree:
            if not block.pins:
                self._free_private(block)
            return
        if hint is not None:
            self._evictor.touch(block, hint)
        if not block.pins:
            if block.busy:
                self._evictor.hold_above(block)
            self._let_go(block)

    def _let_go(self, block: Block) -> None:
        copy = block.copies.get(GPU)
        if copy is None:
            self._evictor.prune(block)
        elif copy.is_listed or copy.state is not CopyState.READY:
            self._evictor.refresh(block)
        elif not block.busy:
            self._evictor.drop(block, Why.REMOVED)  # without its ancestors it is out of reach

    def _free_private(self, block: Block) -> None:
        copy = block.copies.get(GPU)
        if len(block.copies) == 1 and copy is not None and not copy.readers:
            self._residency.drop(block, GPU)
        else:
            self._tails.give_up(block)


def _has_child_here(block: Block) -> bool:
    return any(GPU in child.copies for child in block.children.values())
