"""The tiers below the pool: what goes down, when, and who leaves for it.

Copies go down in the background: blocks are *offered* to the tier below when they become READY, are
hit, or are about to be evicted, and the tier's admission policy says which it wants. `pump` begins
as many of the wanted moves as the budgets allow. Nothing ever waits for a lower tier: what it
does not take is dropped, and computed again when it is needed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from tierkv.cache.evictor import CPU, GPU, NVME, Evictor, Hinter
from tierkv.cache.kept import is_pinned
from tierkv.cache.lookup import lower_tier
from tierkv.cache.moves import Moves
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState, Residency
from tierkv.policies.admission import AdmissionPolicy, ByteRateLimit, When
from tierkv.policies.base import AccessHint, EvictionPolicy, Why
from tierkv.types import MovePriority, TierName

_MOST_TRIES = 16  # victims looked at for one slot
_MOST_OFFERS = 1 << 16  # waiting; when a tier is that far behind, what comes is dropped


@dataclass(slots=True)
class TierSpec:
    """A lower tier.

    Attributes:
        name: CPU or NVME.
        capacity: slots.
        eviction, admission: its policies.
        rate: bound on bytes written over time (flash wear), or None.
    """

    name: TierName
    capacity: int
    eviction: EvictionPolicy
    admission: AdmissionPolicy
    rate: ByteRateLimit | None = None


@dataclass(slots=True)
class MoveLimits:
    """How much may move.

    Attributes:
        step_bytes: of write-backs begun in one step.
        link_bytes: of write-backs and swaps in flight on one link; at most the mover's staging
            memory, or what waits for a disk keeps its place in the pool.
        load_timeout_s: after it a load is a miss.
        room: share of the pool kept EMPTY or droppable by demoting ahead.
    """

    step_bytes: int = 64 << 20
    link_bytes: int = 128 << 20
    load_timeout_s: float = 10.0
    room: float = 0.02


class LowerTiers:
    """Write-behind into the lower tiers, and room in them.

    Args:
        specs: the tiers from hot to cold.
        residency, evictors, moves: of all tiers.
        limits: see `MoveLimits`.
        hint_of: for policies.
        block_size: tokens per block.

    Attributes:
        is_urgent: what goes down must not be lost; write rates do not count.
    """

    def __init__(
        self,
        specs: Iterable[TierSpec],
        residency: Residency,
        evictors: dict[TierName, Evictor],
        moves: Moves,
        limits: MoveLimits,
        hint_of: Hinter,
        block_size: int,
    ) -> None:
        self.block_size = block_size
        self.is_urgent = False
        self.specs = {spec.name: spec for spec in specs}
        self.limits = limits
        self._residency = residency
        self._evictors = evictors
        self._moves = moves
        self.hint_of = hint_of
        names = [GPU, *self.specs]
        self._below = dict(itertools.pairwise(names))
        self._outbox: deque[tuple[Block, TierName]] = deque()
        self._queued: set[tuple[bytes, TierName]] = set()
        self._demoted_at: tuple[int, int] | None = None

    @property
    def below_pool(self) -> TierName:
        return self._below[GPU]

    @property
    def num_queued(self) -> int:
        return len(self._outbox)

    # ------------------------------------------------------------------ offers

    def offer(self, block: Block, tier: TierName, when: When, hint: AccessHint) -> None:
        """Something happened to the block's copy in `tier`: the tier below may want it."""
        below = self._below.get(tier)
        if below is None or below in block.copies or (block.key, below) in self._queued:
            return
        if len(self._outbox) >= _MOST_OFFERS:
            return
        if self._admits(block, below, when, hint):
            self.insist(block, below)

    def _admits(self, block: Block, tier: TierName, when: When, hint: AccessHint) -> bool:
        return is_pinned(block) or self.specs[tier].admission.admits(block.key, when, hint)

    def insist(self, block: Block, tier: TierName) -> None:
        """Send the block down to `tier`, which is not asked whether it wants it."""
        if tier not in block.copies and (block.key, tier) not in self._queued:
            self._outbox.append((block, tier))
            self._queued.add((block.key, tier))

    def leaving_pool(self, blocks: Iterable[Block]) -> None:
        """These pool copies are about to be dropped: their use counts in the tier below."""
        for block in blocks:
            tier = lower_tier(block)
            if tier is not None:
                self._evictors[tier].touch(block, self.hint_of(block))

    def clear_offers(self) -> None:
        self._outbox.clear()
        self._queued.clear()

    # ------------------------------------------------------------------ begin moves down

    def pump(self) -> None:
        """Begin write-backs, as far as the budgets go."""
        self._demote_ahead()
        budget = self.limits.step_bytes
        refused: set[tuple[bytes, TierName]] = set()
        while self._outbox and budget > 0:
            block, tier = self._outbox.popleft()
            self._queued.discard((block.key, tier))
            source = self._source_for(block, tier)
            if source is None or tier in block.copies:
                continue
            if not self._moves.has_parent_below(block, tier):
                self._offer_parent_first(block, tier, refused)
            elif not self.has_budget(source, tier):
                self._requeue(block, tier)
                return
            elif self.make_slot(tier, block) and self._may_write(tier):
                self._moves.begin(block, source, tier, MovePriority.WRITE_BACK)
                budget -= self._moves.slot_bytes
            else:
                refused.add((block.key, tier))

    def _requeue(self, block: Block, tier: TierName) -> None:
        self._outbox.appendleft((block, tier))
        self._queued.add((block.key, tier))

    def _offer_parent_first(
        self, block: Block, tier: TierName, refused: set[tuple[bytes, TierName]]
    ) -> None:
        """Root first: a parent that was never taken goes before the block, or neither goes. Where
        moves fail neither does: the parent may have been on its way a moment ago."""
        parent = block.parent
        source = self._source_for(parent, tier) if parent is not None else None
        is_open = source is not None and not self._moves.has_failed_lately((source, tier))
        if parent is None or (parent.key, tier) in refused or not is_open:
            refused.add((block.key, tier))
            return
        refused.add((parent.key, tier))  # it has one try
        self._requeue(block, tier)
        self._requeue(parent, tier)

    def _source_for(self, block: Block, tier: TierName) -> TierName | None:
        """The nearest tier above `tier` whose copy can be read."""
        if not block.in_tree:
            return None
        for source in (CPU, GPU) if tier is NVME else (GPU,):
            copy = block.copies.get(source)
            if copy is not None and copy.state is CopyState.READY:
                return source
        return None

    def has_budget(self, source: TierName, tier: TierName) -> bool:
        """Whether the link is not so far behind that nothing more should wait for it."""
        return self._moves.in_flight_bytes[source, tier] < self.limits.link_bytes

    def _may_write(self, tier: TierName) -> bool:
        rate = self.specs[tier].rate
        return (
            rate is None or self.is_urgent or rate.take(self._moves.slot_bytes, self._moves.now())
        )

    def _demote_ahead(self) -> None:
        """Blocks that would be lost with their pool copy go down before the room is needed."""
        pool, below = self._residency.tiers[GPU], self.below_pool
        wanted = int(pool.capacity * self.limits.room) - pool.num_empty
        evictor = self._evictors[GPU]
        seen = evictor.num_evicted, evictor.num_evictable
        if wanted <= 0 or seen == self._demoted_at or not self.has_budget(GPU, below):
            return
        lost = [b for b in evictor.victims(min(wanted, _MOST_TRIES)) if lower_tier(b) is None]
        self._demoted_at = None if lost else seen  # none: nor will there be while nothing changes
        for block in lost:
            if below not in block.copies and _is_leaf(block):
                self._drain(block, GPU, below)

    def _drain(self, block: Block, source: TierName, tier: TierName) -> bool:
        """Begin to demote; False when the tier below does not want it, has no room, or is sick: a
        block that is on its way there in vain again and again is no room for others either."""
        hint = self.hint_of(block)
        if (
            self._admits(block, tier, When.EVICTED, hint)
            and self._moves.has_parent_below(block, tier)
            and self.has_budget(source, tier)
            and not self._moves.has_failed_lately((source, tier))
            and self.make_slot(tier, block)
            and self._may_write(tier)
        ):
            self._moves.begin(block, source, tier, MovePriority.WRITE_BACK, is_drain=True)
            return True
        return False

    # ------------------------------------------------------------------ room

    def make_slot(self, tier: TierName, candidate: Block) -> bool:
        """Have an EMPTY slot in a lower tier, dropping the least valuable copy if need be; that of
        an owner who is at its quota.

        False when there is none now: everything is in use, the policy prefers what it has to the
        candidate, or the victim is on its own way down first.
        """
        owner = candidate.owner
        if owner is not None and not owner.is_full(tier):
            owner = None
        if owner is None and self._residency.tiers[tier].num_empty:
            return True
        evictor, below = self._evictors[tier], self._below.get(tier)
        for _ in range(_MOST_TRIES):
            victims = evictor.victims(1, candidate.key, owner)
            if not victims:
                return False
            victim = victims[0]
            if victim is candidate or victim is candidate.parent or evictor.is_missed(victim):
                evictor.touch(victim, self.hint_of(victim))
                continue
            if below is not None and below not in victim.copies:
                if self._drain(victim, tier, below):
                    return False
                if not self.has_budget(tier, below):
                    return False  # others are on their way down; the next try finds their slots
            evictor.drop(victim, Why.EVICTED)
            if owner is None or not owner.is_full(tier):
                return True
        return False

    # ------------------------------------------------------------------ promote, swap

    def promote(self, block: Block) -> int:
        """Begin to bring a block from NVMe to the CPU tier, if both exist; returns moves begun."""
        copy = block.copies.get(NVME)
        if CPU not in self.specs or CPU in block.copies or copy is None:
            return 0
        if copy.state is not CopyState.READY or not self.make_slot(CPU, block):
            return 0
        self._moves.begin(block, NVME, CPU, MovePriority.PREFETCH)
        return 1

    def push(self, blocks: Iterable[Block]) -> None:
        """Blocks of a sequence that is swapped out: those without a lower copy go down now."""
        tier = self.below_pool
        for block in blocks:
            if not block.in_tree or lower_tier(block) is not None or tier in block.copies:
                continue
            source = self._source_for(block, tier)
            fits = self._moves.has_parent_below(block, tier) and self.has_budget(GPU, tier)
            if source is GPU and fits and self.make_slot(tier, block):
                self._moves.begin(block, GPU, tier, MovePriority.SWAP_OUT)


def _is_leaf(block: Block) -> bool:
    """No child is in the pool: one that was proposed before the block may have stayed."""
    return not any(GPU in child.copies for child in block.children.values())
