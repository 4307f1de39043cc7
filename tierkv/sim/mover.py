"""Moves in virtual time: links with a bandwidth each, and devices that several links share.

    a link carries one move at a time, the most urgent of those that wait, equals as they came
    turn over = max(link is free + bytes / bandwidth,
                    device is free + bytes / the device's bandwidth)
    end       = turn over + latency

so a link that is alone gets its own rate, and links that share a device (the reads and writes of a
drive, both ways of PCIe) together no more than the device's, in turns. What a move takes is known
when its turn comes, so nothing is computed between two events. A move down to the drive lets go of
the pool when its turn comes: its bytes are in staging memory then, as with the real mover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Protocol

from tierkv.errors import InvariantError
from tierkv.sim.clock import VirtualClock
from tierkv.types import Erasure, Move, MoveFailure, MoveResult, TierName

Link = tuple[TierName, TierName]
GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME


@dataclass(slots=True, frozen=True)
class LinkSpec:
    """One direction between two tiers.

    Attributes:
        bandwidth: bytes per second.
        latency_s: from the last byte's turn until the move has ended.
        device: name of what it shares with other links.
    """

    bandwidth: float
    latency_s: float = 0.0
    device: str = ""


@dataclass(slots=True, frozen=True)
class Fault:
    """What goes wrong with a move: it takes longer, and may fail."""

    delay_s: float = 0.0
    failure: MoveFailure | None = None


@dataclass(slots=True)
class LinkUse:
    """What a link has carried.

    Attributes:
        num_moves: whose turn has come.
        busy_s: it was carrying them, or waited for its device.
        queued_s: they waited for their turn, all together.
    """

    num_moves: int = 0
    busy_s: float = 0.0
    queued_s: float = 0.0


class Watcher(Protocol):
    """Is told when bytes are read and written (a ledger of contents, say)."""

    def begun(self, move: Move) -> None:
        """From now on the destination may change."""
        ...

    def staged(self, move: Move) -> None:
        """The source has been read; it may change from now on."""
        ...

    def ended(self, move: Move, failure: MoveFailure | None) -> MoveFailure | None:
        """The bytes have arrived, unless it failed; returns how it ended after all."""
        ...


class _Lane:
    """A link's state: moves that wait, and when it is free."""

    __slots__ = ("free_s", "index", "spec", "use", "waiting")

    def __init__(self, index: int, spec: LinkSpec) -> None:
        self.index = index
        self.spec = spec
        self.free_s = 0.0
        self.use = LinkUse()
        self.waiting: list[tuple[int, int, float, Move]] = []


class SimMover:
    """A `Mover` that moves nothing and takes its time.

    Args:
        clock: advanced by `wait` only.
        links: between the tiers that there are.
        devices: bytes per second of what links share.
        slot_bytes: bytes of a block.
        fault: asked once about each move when its turn comes.
        watcher: is told of every move.
    """

    def __init__(
        self,
        clock: VirtualClock,
        links: Mapping[Link, LinkSpec],
        devices: Mapping[str, float],
        slot_bytes: int,
        fault: Callable[[Move], Fault | None] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self._clock = clock
        self._lanes = {link: _Lane(i, spec) for i, (link, spec) in enumerate(links.items())}
        self._turns: list[tuple[float, int, _Lane]] = []
        self._devices = dict(devices)
        self._device_free_s = dict.fromkeys(devices, 0.0)
        self._slot_bytes = slot_bytes
        self._fault = fault
        self._watcher = watcher
        self._is_closed = False
        self._number = 0
        self._ends: list[tuple[float, int, Move, MoveFailure | None, float]] = []
        self._released: dict[int, None] = {}
        self._unreleased: set[int] = set()
        self._late: set[int] = set()
        self._erased: list[Erasure] = []

    @property
    def uses(self) -> dict[Link, LinkUse]:
        """What each link has carried."""
        return {link: lane.use for link, lane in self._lanes.items()}

    # ------------------------------------------------------------------ begin

    def begin(self, moves: Sequence[Move]) -> None:
        if self._is_closed:
            raise InvariantError("the mover is closed")
        now = self._clock.now()
        self._dispatch(now)  # whose turn came before these
        for move in moves:
            self._number += 1
            lane = self._lanes.get((move.source, move.destination))
            if lane is None:
                raise InvariantError(f"no link {move.source.value} -> {move.destination.value}")
            if not lane.waiting:
                heappush(self._turns, (max(now, lane.free_s), lane.index, lane))
            heappush(lane.waiting, (move.priority, self._number, now, move))
            if move.source is GPU or move.destination is GPU:
                self._unreleased.add(move.ticket)
            if self._watcher is not None:
                self._watcher.begun(move)
        self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        """Let moves begin whose turn has come, in the order of their turns."""
        turns = self._turns
        while turns and turns[0][0] <= now:
            start_s, index, lane = turns[0]
            self._start(lane, start_s)
            if lane.waiting:
                heapreplace(turns, (lane.free_s, index, lane))
            else:
                heappop(turns)

    def _start(self, lane: _Lane, start_s: float) -> None:
        _, number, queued_s, move = heappop(lane.waiting)
        spec, size, use = lane.spec, self._slot_bytes, lane.use
        end = start_s + size / spec.bandwidth
        if spec.device:
            shared = max(self._device_free_s[spec.device], start_s)
            shared += size / self._devices[spec.device]
            self._device_free_s[spec.device] = shared
            end = max(end, shared)
        lane.free_s = end
        use.num_moves += 1
        use.busy_s += end - start_s
        use.queued_s += start_s - queued_s
        fault = self._fault(move) if self._fault is not None else None
        failure = None
        if fault is not None:
            end, failure = end + fault.delay_s, fault.failure
        if move.source is GPU and move.destination is NVME:
            if self._watcher is not None:
                self._watcher.staged(move)
            self._release(move.ticket)
        heappush(self._ends, (end + spec.latency_s, number, move, failure, end - start_s))

    def _release(self, ticket: int) -> None:
        if ticket in self._unreleased:
            self._unreleased.discard(ticket)
            self._released[ticket] = None

    # ------------------------------------------------------------------ end

    def next_event_s(self) -> float | None:
        """When to poll next, as things stand; None when nothing moves."""
        now = self._clock.now()
        self._dispatch(now)
        if self._released or self._erased:
            return now
        times = [self._ends[0][0]] if self._ends else []
        staging = self._lanes.get((GPU, NVME))
        if self._fault is not None and self._turns:
            times.append(self._turns[0][0])  # who comes next may overtake who was delayed
        elif staging is not None and staging.waiting:
            times.append(staging.free_s)
        return min(times, default=None)

    def poll(self) -> list[MoveResult]:
        now, results = self._clock.now(), []
        self._dispatch(now)
        while self._ends and self._ends[0][0] <= now:
            _, _, move, failure, seconds = heappop(self._ends)
            results.append(MoveResult(move.ticket, self._end(move, failure), seconds))
        return results

    def _end(self, move: Move, failure: MoveFailure | None) -> MoveFailure | None:
        ticket = move.ticket
        self._unreleased.discard(ticket)
        self._released.pop(ticket, None)
        if ticket in self._late:
            self._late.discard(ticket)
            failure = MoveFailure.LATE
        return failure if self._watcher is None else self._watcher.ended(move, failure)

    def poll_released(self) -> list[int]:
        self._dispatch(self._clock.now())
        released, self._released = list(self._released), {}
        return released

    def abandon(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            if ticket in self._unreleased:
                self._release(ticket)
                self._late.add(ticket)

    def poll_erased(self) -> list[Erasure]:
        erased, self._erased = self._erased, []
        return erased

    def wait(self, timeout_s: float) -> None:
        until, event = self._clock.now() + timeout_s, self.next_event_s()
        self._clock.advance_to(until if event is None else min(until, event))

    # ------------------------------------------------------------------ the persistent tier

    def erase(self, slots: Sequence[int]) -> None:
        self._erased += [Erasure(slot, None) for slot in dict.fromkeys(slots)]

    def touch(self, slots: Sequence[int]) -> None:
        """Nothing is kept about uses."""

    def is_quarantined(self, *, is_read: bool) -> bool:
        return False

    def close(self) -> None:
        self._is_closed = True
