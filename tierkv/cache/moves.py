"""Two-phase moves: every copy between tiers is begun, and then committed or aborted.

`begin` reserves the destination's slot (FILLING) and holds the source; the mover copies bytes in
the background; `poll` ends what has ended: commit makes the destination READY, abort gives its slot
back, both let go of the source. A load that is late is a miss for whoever waits for it; its slot
belongs to the ticket until the mover has released it, or the bytes have landed.

    plain   source READY                    commit: both tiers hold the block
    drain   source READY -> DRAINING        commit: only the destination does; a hit in between
                                            rescues the source and makes the move a plain one

The mover may release a source before the move ends, because it has a copy of its own: a plain
move's source is then free to leave, and a drain's is gone. If that move fails, so is the block.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from tierkv.cache.erasures import Erasures
from tierkv.cache.evictor import CPU, GPU, NVME, Evictor, Hinter
from tierkv.cache.holder import BlockHolder
from tierkv.cache.prefix_tree import Block, Copy
from tierkv.cache.residency import CopyState, Residency
from tierkv.errors import InvariantError
from tierkv.policies.base import Why
from tierkv.protocols import Clock, Mover
from tierkv.types import BlockKey, Move, MoveFailure, MovePriority, MoveResult, TierName

Link = tuple[TierName, TierName]
_ARRIVED = (CopyState.READY, CopyState.DRAINING)
_COMING = (*_ARRIVED, CopyState.FILLING)
_SOURCE_IS_GONE = (MoveFailure.LOST, MoveFailure.CORRUPT)
_PAUSE_S = 1.0  # after a failure nothing is given up for the sake of the link


@dataclass(slots=True, eq=False)
class Ticket:
    """A move in flight.

    Attributes:
        copy: the destination, which it fills.
        waiters: sequences that cannot go on without it.
        is_drain: the source goes when the bytes have arrived.
        is_late: nobody waits any more and `copy` belongs to no block.
        is_released: the mover does not use the pool's slot any more: the source of a move down,
            the destination of a late load.
    """

    move: Move
    block: Block
    copy: Copy
    is_drain: bool
    deadline_s: float
    waiters: list[BlockHolder] = field(default_factory=list)
    is_late: bool = False
    is_released: bool = False

    @property
    def holds_source(self) -> bool:
        return not (self.is_released and self.move.source is GPU)

    @property
    def link(self) -> Link:
        return self.move.source, self.move.destination


@dataclass(slots=True)
class LinkStats:
    """What one link (source tier, destination tier) did since the start, and when a block that it
    carried did not get in last: it failed, or its parent had not got in."""

    num_moves: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    failures: Counter[MoveFailure] = field(default_factory=Counter)
    failed_s: float = float("-inf")


@dataclass(slots=True)
class Ended:
    """A move that ended, or a wait that became late (its ticket then ends a second time):
    `is_ready` says whether the destination holds the block now."""

    ticket: Ticket
    is_ready: bool


class Moves:
    """All moves in flight.

    Args:
        residency, evictors: states and policies of the tiers.
        mover: copies the bytes.
        clock: for deadlines.
        hint_of: for policies that are told of a new copy.
        slot_bytes: bytes of a block.
        is_chained: blocks enter a lower tier with or after their parent.

    Attributes:
        tickets: by number.
        loads: those into the pool that are not late, by block.
        erasures: of the persistent tier, if there is one.
        stalled: how many late loads each tier still has to end; such a tier gives no hits, or every
            request would wait for a disk that has stopped to answer.
    """

    def __init__(
        self,
        residency: Residency,
        evictors: dict[TierName, Evictor],
        mover: Mover,
        clock: Clock,
        hint_of: Hinter,
        *,
        slot_bytes: int,
        is_chained: bool,
    ) -> None:
        self.tickets: dict[int, Ticket] = {}
        self.loads: dict[BlockKey, Ticket] = {}
        self.in_flight_bytes: Counter[Link] = Counter()
        self.stats: dict[Link, LinkStats] = {}
        self.stalled: Counter[TierName] = Counter()
        self.num_lost = 0
        self.num_rescued = 0
        self.slot_bytes = slot_bytes
        self._residency = residency
        self._evictors = evictors
        self._mover = mover
        self._clock = clock
        self._hint_of = hint_of
        self._is_chained = is_chained
        self._numbers = itertools.count(1)
        self._begun: list[Move] = []
        self._down: dict[Copy, Ticket] = {}
        self.erasures: Erasures | None = None
        if NVME in evictors:
            stored, left = residency.tiers[NVME], evictors[NVME].left_slots
            self.erasures = Erasures(mover, stored, left, clock)

    @property
    def has_work(self) -> bool:
        """Moves or erasures are under way."""
        return bool(self.tickets) or (self.erasures is not None and self.erasures.num_begun > 0)

    @property
    def num_leaving(self) -> int:
        """Pool blocks that will be free to leave when moves have ended."""
        return sum(
            1
            for ticket in self.tickets.values()
            if ticket.move.source is GPU and ticket.holds_source and not ticket.block.pins
        )

    def is_quarantined(self, *, is_read: bool) -> bool:
        """Whether the persistent tier is left alone now."""
        return self._mover.is_quarantined(is_read=is_read)

    def has_failed_lately(self, link: Link) -> bool:
        """Whether the next move on the link is likely to fail too."""
        stats = self.stats.get(link)
        return stats is not None and self._clock.now() - stats.failed_s < _PAUSE_S

    # ------------------------------------------------------------------ begin

    def begin(
        self,
        block: Block,
        source: TierName,
        destination: TierName,
        priority: MovePriority,
        *,
        is_drain: bool = False,
        deadline_s: float = float("inf"),
    ) -> Ticket:
        """Reserve and hold; the bytes start with `take_begun`.

        The caller has made sure that `destination` has an empty slot and does not hold the block,
        and that the source copy is READY.
        """
        copy = block.copies[source]
        if copy.state is not CopyState.READY:
            raise InvariantError(f"{block.key.hex()}: {source.value} copy is {copy.state}")
        slot = self._residency.begin_fill(block, destination)
        self._hold(block, source)
        if is_drain:
            self._start_draining(block, source)
        parent = block.parent.key if block.parent is not None else b""
        priority = self._not_before_parent(block, destination, priority)
        move = Move(
            next(self._numbers), block.key, parent, block.tokens,
            source, copy.slot, destination, slot, priority,
        )  # fmt: skip
        ticket = Ticket(move, block, block.copies[destination], is_drain, deadline_s)
        self.tickets[move.ticket] = ticket
        if destination is GPU:
            self.loads[block.key] = ticket
        else:
            self._down[ticket.copy] = ticket
        self.in_flight_bytes[ticket.link] += self.slot_bytes
        self._begun.append(move)
        return ticket

    def _not_before_parent(
        self, block: Block, tier: TierName, priority: MovePriority
    ) -> MovePriority:
        """Into a lower tier no more urgent than the parent that is on its way there: a child that
        overtook it would be refused on arrival."""
        above = block.parent.copies.get(tier) if block.parent is not None else None
        ticket = self._down.get(above) if above is not None else None
        return priority if ticket is None else max(priority, ticket.move.priority)

    def take_begun(self) -> list[Move]:
        """Moves begun since the last call, for the mover."""
        begun, self._begun = self._begun, []
        return begun

    def start(self, moves: list[Move]) -> None:
        """Hand moves to the mover, and tell the persistent tier what was used."""
        if moves:
            self._mover.begin(moves)
        if NVME in self._evictors and (touched := self._evictors[NVME].take_touched()):
            self._mover.touch(sorted(touched))

    def rescue(self, block: Block) -> None:
        """A DRAINING copy in the pool was hit: it stays."""
        self._residency.rescue(block, GPU)
        self.num_rescued += 1
        for ticket in self.tickets.values():
            if ticket.block is block and ticket.is_drain:
                ticket.is_drain = False
        self._evictors[GPU].enter(block, self._hint_of(block))

    # ------------------------------------------------------------------ end

    def poll(self) -> list[Ended]:
        """End every move whose result is there, and every wait that has become late."""
        for number in self._mover.poll_released():
            self._release(self.tickets[number])
        results = self._mover.poll()
        if self.erasures is not None:
            self.erasures.poll()
        return [self._end(result) for result in results] + self._expire()

    def wait(self, timeout_s: float) -> None:
        self._mover.wait(timeout_s)

    def erase(self, slots: list[int]) -> None:
        """Blocks of the persistent tier that must not come back, and all that were dropped."""
        if self.erasures is not None:
            self.erasures.begin(slots)

    def now(self) -> float:
        return self._clock.now()

    def _end(self, result: MoveResult) -> Ended:
        ticket = self.tickets.pop(result.ticket)
        self._count(ticket, result)
        block, destination = ticket.block, ticket.move.destination
        arrived = result.failure is None and not ticket.is_late
        if ticket.is_late:
            self.stalled -= Counter([ticket.move.source])
            if not ticket.is_released:
                self._residency.free(ticket.copy, destination)
        elif arrived and self._may_enter(block, destination):
            self._residency.commit_fill(block, destination)
        else:
            arrived = False
            self._stats(ticket.link).failed_s = self._clock.now()
            self._residency.drop(block, destination)
        if destination is not GPU:
            del self._down[ticket.copy]
        elif not ticket.is_late:
            del self.loads[block.key]
        if destination is NVME and self.erasures is not None:
            self.erasures.write_ended(ticket.copy.slot, is_written=result.failure is None)
        if ticket.holds_source:
            self._release_source(ticket, arrived, result.failure)
        if arrived and block.in_tree:
            self._enter(block, destination)
        elif block.in_tree:
            self._evictors[destination].prune(block)
        return Ended(ticket, arrived)

    def _may_enter(self, block: Block, tier: TierName) -> bool:
        """Persistence is root-first: a parent that did not arrive takes its children along."""
        return tier is GPU or not block.in_tree or self.has_parent_below(block, tier, _ARRIVED)

    def has_parent_below(
        self, block: Block, tier: TierName, states: tuple[CopyState, ...] = _COMING
    ) -> bool:
        """Whether the parent is in `tier` (or below) in one of `states`, or is not needed."""
        parent = block.parent
        if not self._is_chained or parent is None or parent.depth < 0:
            return True
        tiers = (CPU, NVME) if tier is CPU else (NVME,)
        return any(t in parent.copies and parent.copies[t].state in states for t in tiers)

    def _enter(self, block: Block, tier: TierName) -> None:
        evictor = self._evictors[tier]
        evictor.enter(block, self._hint_of(block))
        copy = block.copies[tier]
        if tier is GPU and not copy.is_listed and not block.pins:
            evictor.drop(block, Why.REMOVED)  # its ancestors have left the pool: out of reach

    def _release(self, ticket: Ticket) -> None:
        """A late load gives its slot back. Of a move down the source may go, and a draining one
        does."""
        ticket.is_released = True
        if ticket.is_late:
            self._residency.free(ticket.copy, GPU)
            return
        block, source = ticket.block, ticket.move.source
        self._let_go(block, source)
        if ticket.is_drain:
            self._residency.drop(block, source)

    def _release_source(self, ticket: Ticket, arrived: bool, failure: MoveFailure | None) -> None:
        block, source = ticket.block, ticket.move.source
        self._let_go(block, source)
        if ticket.is_drain and arrived:
            self._residency.drop(block, source)
        elif ticket.is_drain:
            self._residency.rescue(block, source)
            if block.in_tree:
                self._enter(block, source)
        elif failure in _SOURCE_IS_GONE and block.in_tree and not block.copies[source].readers:
            self.num_lost += 1
            self._evictors[source].drop(block, Why.REMOVED)

    def _expire(self) -> list[Ended]:
        now = self._clock.now()
        late = [t for t in self.loads.values() if t.deadline_s < now]
        for ticket in late:
            del self.loads[ticket.block.key]
            self._residency.detach(ticket.block, GPU)
            ticket.is_late = True
            self.stalled[ticket.move.source] += 1
            self._stats(ticket.link).failures[MoveFailure.LATE] += 1
        if late:
            self._mover.abandon([ticket.move.ticket for ticket in late])
        return [Ended(ticket, False) for ticket in late]

    def _count(self, ticket: Ticket, result: MoveResult) -> None:
        self.in_flight_bytes[ticket.link] -= self.slot_bytes
        stats = self._stats(ticket.link)
        stats.seconds += result.seconds
        if result.failure is None:
            stats.num_moves += 1
            stats.num_bytes += self.slot_bytes
        else:
            stats.failures[result.failure] += 1

    def _stats(self, link: Link) -> LinkStats:
        stats = self.stats.get(link)
        if stats is None:
            stats = self.stats[link] = LinkStats()
        return stats

    # ------------------------------------------------------------------ the source

    def _hold(self, block: Block, tier: TierName) -> None:
        block.copies[tier].readers += 1
        if tier is GPU:
            self._make_busy(block)
        elif block.in_tree:
            self._evictors[tier].refresh(block)

    def _let_go(self, block: Block, tier: TierName) -> None:
        block.copies[tier].readers -= 1
        if tier is GPU:
            self._make_idle(block)
        elif block.in_tree:
            self._evictors[tier].refresh(block)

    def _make_busy(self, block: Block) -> None:
        block.busy += 1
        if block.busy == 1:
            self._evictors[GPU].settle(block)
            self._evictors[GPU].hold_above(block)

    def _make_idle(self, block: Block) -> None:
        block.busy -= 1
        if not block.busy:
            above = self._evictors[GPU].let_go_above(block)
            for node in [block, *above]:
                self._evictors[GPU].settle(node)

    def _start_draining(self, block: Block, tier: TierName) -> None:
        if block.in_tree:
            self._evictors[tier].leave(block, Why.EVICTED)
            self._evictors[tier].num_evicted += 1
        self._residency.drain(block, tier)
