"""What requests and callers want kept: pins, times to live, and priorities of retention.

A pin is a named set of keys under a budget. It holds by content: a pinned block that was lost is
pinned again when it is computed again. It costs no running sequence a block: the copy in the pool
can always be evicted.

A time to live begins at the end of the request that asks for it. It counts for blocks that only
such requests used: one that asks for nothing makes a block like any other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from tierkv.cache.evictor import Evictor, Hinter
from tierkv.cache.holder import BlockHolder
from tierkv.cache.kept import Kept
from tierkv.cache.lower_tiers import LowerTiers
from tierkv.cache.prefix_tree import Block, PrefixTree
from tierkv.cache.residency import CopyState
from tierkv.errors import ConflictError
from tierkv.policies.admission import When
from tierkv.protocols import Clock
from tierkv.types import BlockKey, TierName

_MOST_PINS = 4096
_FIRST_PAUSE_S = 0.02
_MAX_PAUSE_S = 2.0


@dataclass(slots=True)
class Pin:
    """Blocks that stay until `until_s`; `tenant` is charged for them."""

    keys: list[BlockKey]
    tenant: str
    until_s: float


class Keeps:
    """All marks of one cache, and who made them.

    Args:
        tree, evictors, lower, clock, hint_of: of the cache.

    Attributes:
        is_active: somebody has asked for something: only then need sequences be told of.
        budget: blocks that may be pinned.
        weights: of tenants; with any, each may pin its share of the budget.
        pins: by name.
    """

    def __init__(
        self,
        tree: PrefixTree,
        evictors: Mapping[TierName, Evictor],
        lower: LowerTiers | None,
        clock: Clock,
        hint_of: Hinter,
    ) -> None:
        self.is_active = False
        self.budget = 0
        self.weights: dict[str, float] = {}
        self.pins: dict[str, Pin] = {}
        self._tree = tree
        self._evictors = evictors
        self._lower = lower
        self._clock = clock
        self._hint_of = hint_of
        self._counts: Counter[BlockKey] = Counter()
        self._payers: dict[BlockKey, str] = {}
        self._by_tenant: Counter[str] = Counter()
        self._timers: list[tuple[float, int, Block]] = []
        self._num_timers = self._most_timers = 0
        self._next_end_s = math.inf
        self._unsettled: dict[BlockKey, None] = {}  # in order: nothing depends on hashes
        self._retry_s, self._pause_s = 0.0, _FIRST_PAUSE_S

    # ------------------------------------------------------------------ what requests do

    def sealed(self, seq: BlockHolder, block: Block, *, is_new: bool) -> None:
        """The sequence's block became public, or turned out to be (not `is_new`) already."""
        self._note_use(seq, block, is_new)
        self.arrived(block)

    def arrived(self, block: Block) -> None:
        """A block is in the tree: it may be one that is pinned."""
        if block.key in self._counts:
            self._pin_block(block)

    def used(self, seq: BlockHolder, blocks: Iterable[Block | None]) -> None:
        """The sequence found these blocks."""
        for block in blocks:
            if block is not None:
                self._note_use(seq, block, False)

    def _note_use(self, seq: BlockHolder, block: Block, is_new: bool) -> None:
        """The highest priority of its users counts, and a time to live if all of them gave one."""
        hints = seq.hints
        ttl, priority = (None, 0) if hints is None else (hints.ttl, hints.priority)
        kept = block.kept
        if kept is None:
            if not (priority > 0 or (is_new and (priority or ttl is not None))):
                return
            kept = self._mark(block)
            kept.priority = priority
            self._renew(block)
            if is_new and ttl is not None:
                self._expire_at(block, self._clock.now() + ttl)
            return
        if priority > kept.priority:
            kept.priority = priority
            self._renew(block)
        if ttl is None:
            self._expire_at(block, math.inf)

    def released(self, seq: BlockHolder) -> None:
        """The sequence lets go of its blocks: its time to live begins."""
        if seq.hints is None or seq.hints.ttl is None:
            return
        end_s = self._clock.now() + seq.hints.ttl
        for block in seq.blocks:
            if block is not None and block.kept is not None and block.kept.expires_s != math.inf:
                self._expire_at(block, max(end_s, block.kept.expires_s))

    # ------------------------------------------------------------------ what callers do

    def pin(self, name: str, tenant: str, keys: list[BlockKey], until_s: float = math.inf) -> None:
        """Keep these blocks; takes the place of an earlier pin of that name.

        Raises:
            ConflictError: the budget, or the tenant's share of it, is too small; with the numbers.
        """
        self.is_active = True
        before = self.pins.get(name)
        self.unpin(name)
        try:
            self._check_budget(tenant, keys)
        except ConflictError:
            if before is not None:
                self._add(name, before)
            raise
        self._add(name, Pin(keys, tenant, until_s))

    def _check_budget(self, tenant: str, keys: list[BlockKey]) -> None:
        new = len(set(keys) - self._counts.keys())
        count = sum(pin.tenant == tenant for pin in self.pins.values())
        if count >= (most := self._part(tenant, _MOST_PINS)):
            raise ConflictError("pin", count, f"at most {most} pins: unpin some")
        for who, used, most in (
            ("", len(self._counts), self.budget),
            (
                f" of {tenant or 'those without a tenant'}",
                self._by_tenant[tenant],
                self.share(tenant),
            ),
        ):
            if used + new > most:
                fix = f"the pin budget{who} is {most} blocks, {used} are pinned: unpin some"
                raise ConflictError("pin", f"{new} blocks", fix)

    def share(self, tenant: str) -> int:
        """Blocks that the tenant may pin."""
        return self._part(tenant, self.budget)

    def _part(self, tenant: str, whole: int) -> int:
        weights = self.weights
        if not weights:
            return whole
        return int(whole * weights.get(tenant, 1.0) / sum(weights.values()))

    def _add(self, name: str, pin: Pin) -> None:
        self.pins[name] = pin
        self._next_end_s = min(self._next_end_s, pin.until_s)
        for key in dict.fromkeys(pin.keys):
            self._counts[key] += 1
            if self._counts[key] == 1:
                self._payers[key] = pin.tenant
                self._by_tenant[pin.tenant] += 1
        for key in pin.keys:
            block = self._tree.get(key)
            if block is not None:
                self._pin_block(block)

    def unpin(self, name: str) -> bool:
        """Let these blocks go their way; False when nothing has that name."""
        pin = self.pins.pop(name, None)
        if pin is None:
            return False
        for key in dict.fromkeys(pin.keys):
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
                self._by_tenant[self._payers.pop(key)] -= 1
                self._unsettled.pop(key, None)
                block = self._tree.get(key)
                if block is not None and block.kept is not None:
                    block.kept.is_pinned = False
                    self._renew(block)
        return True

    def set_ttl(self, keys: Iterable[BlockKey], ttl: float | None) -> int:
        """Let blocks be the first to go in `ttl` seconds, or (None) not before others.

        Returns:
            How many of them there are.
        """
        self.is_active = True
        found = [block for block in map(self._tree.get, keys) if block is not None]
        for block in found:
            self._expire_at(block, math.inf if ttl is None else self._clock.now() + ttl)
        return len(found)

    @property
    def has_unsettled(self) -> bool:
        """Pinned blocks have not reached the last tier: `poll` offers them again."""
        return bool(self._unsettled)

    @property
    def num_pinned(self) -> int:
        """Different blocks that are pinned, present or not."""
        return len(self._counts)

    def num_pinned_of(self, tenant: str) -> int:
        """Those that a tenant is charged for."""
        return self._by_tenant[tenant]

    # ------------------------------------------------------------------ time

    def poll(self) -> None:
        """End what has expired, and send pinned blocks down that were turned away."""
        now = self._clock.now()
        if now >= self._next_end_s:
            for name in [name for name, pin in self.pins.items() if pin.until_s <= now]:
                self.unpin(name)
            self._next_end_s = min((p.until_s for p in self.pins.values()), default=math.inf)
        while self._timers and self._timers[0][0] <= now:
            time_s, _, block = heappop(self._timers)
            if block.in_tree and block.kept is not None and block.kept.timer_s == time_s:
                self._ring(block, block.kept, now)
        if self._unsettled and now >= self._retry_s:
            count = len(self._unsettled)
            self._settle()
            is_better = len(self._unsettled) < count
            self._pause_s = _FIRST_PAUSE_S if is_better else min(2 * self._pause_s, _MAX_PAUSE_S)
            self._retry_s = now + self._pause_s

    def _ring(self, block: Block, kept: Kept, now: float) -> None:
        kept.timer_s = math.inf
        if kept.expires_s > now:
            self._set_timer(block, kept)
        elif not kept.is_expired:
            kept.is_expired = True
            self._renew(block)

    def _expire_at(self, block: Block, time_s: float) -> None:
        kept = self._mark(block)
        kept.expires_s = time_s
        if kept.is_expired:
            kept.is_expired = False
            self._renew(block)
        self._set_timer(block, kept)

    def _set_timer(self, block: Block, kept: Kept) -> None:
        """Have it looked at no later than when it expires; it may be looked at too early."""
        if kept.expires_s >= kept.timer_s:
            return
        kept.timer_s = kept.expires_s
        self._num_timers += 1
        if len(self._timers) > 2 * self._most_timers + 1024:  # most are of blocks that are gone
            self._timers = [timer for timer in self._timers if timer[2].in_tree]
            heapify(self._timers)
            self._most_timers = len(self._timers)
        heappush(self._timers, (kept.expires_s, self._num_timers, block))

    # ------------------------------------------------------------------ blocks

    def _mark(self, block: Block) -> Kept:
        if block.kept is None:
            block.kept = Kept()
        return block.kept

    def _renew(self, block: Block) -> None:
        for tier in block.copies:
            self._evictors[tier].renew(block)

    def _pin_block(self, block: Block) -> None:
        kept = self._mark(block)
        if not kept.is_pinned:
            kept.is_pinned = True
            self._renew(block)
        self._unsettled[block.key] = None
        self._retry_s, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._send_down(block)

    def _send_down(self, block: Block) -> None:
        if self._lower is not None:
            for tier in list(block.copies):
                self._lower.offer(block, tier, When.USED, self._hint_of(block))

    def _settle(self) -> None:
        """Offer again what has not reached the last tier, parents first."""
        last = [*self._evictors][-1]
        waiting = []
        for key in list(self._unsettled):
            block = self._tree.get(key)
            copy = block.copies.get(last) if block is not None else None
            if block is None or (copy is not None and copy.state is CopyState.READY):
                self._unsettled.pop(key, None)
            else:
                waiting.append(block)
        for block in sorted(waiting, key=_depth):
            self._send_down(block)


def _depth(block: Block) -> int:
    return block.depth
