"""Moves in virtual time: links with a bandwidth each, and devices that several links share.

    a link carries one move at a time, the most urgent of those that wait, equals as they came
    end = latency + max(link is free + bytes / bandwidth,
                        device is free + bytes / the device's bandwidth)

so a link that is alone gets its own rate, and links that share a device (the reads and writes of a
drive, both ways of PCIe) together no more than the device's. A move down to the drive lets go of
the pool when it begins: its bytes are in staging memory then, as with the real mover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

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


class _Lane:
    """A link's state: moves that wait, and when it is free."""

    __slots__ = ("free_s", "spec", "waiting")

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self.free_s = 0.0
        self.waiting: list[tuple[int, int, float, Move]] = []


class SimMover:
    """A `Mover` that moves nothing and takes its time.

    Args:
        clock: advanced by `wait` only.
        links: between the tiers that there are.
        devices: bytes per second of what links share.
        slot_bytes: bytes of a block.
        fault: asked once about each move when its turn comes.

    Attributes:
        landed: is told of each move that ends well, at that time (a ledger of contents, say).
    """

    def __init__(
        self,
        clock: VirtualClock,
        links: Mapping[Link, LinkSpec],
        devices: Mapping[str, float],
        slot_bytes: int,
        fault: Callable[[Move], Fault | None] | None = None,
    ) -> None:
        self.landed: Callable[[Move], None] | None = None
        self._clock = clock
        self._lanes = {link: _Lane(spec) for link, spec in links.items()}
        self._devices = dict(devices)
        self._device_free_s = dict.fromkeys(devices, 0.0)
        self._slot_bytes = slot_bytes
        self._fault = fault
        self._number = 0
        self._ends: list[tuple[float, int, Move, MoveFailure | None, float]] = []
        self._released: dict[int, None] = {}
        self._unreleased: set[int] = set()
        self._late: set[int] = set()
        self._erased: list[Erasure] = []

    def begin(self, moves: Sequence[Move]) -> None:
        now = self._clock.now()
        for move in moves:
            self._number += 1
            lane = self._lanes[move.source, move.destination]
            heappush(lane.waiting, (move.priority, self._number, now, move))
            if GPU in (move.source, move.destination):
                self._unreleased.add(move.ticket)
        self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        """Let moves begin whose turn has come."""
        for lane in self._lanes.values():
            while lane.waiting and lane.free_s <= now:
                _, number, queued_s, move = heappop(lane.waiting)
                self._start(lane, number, max(lane.free_s, queued_s), move)

    def _start(self, lane: _Lane, number: int, start_s: float, move: Move) -> None:
        spec, size = lane.spec, self._slot_bytes
        end = start_s + size / spec.bandwidth
        if spec.device:
            shared = max(self._device_free_s[spec.device], start_s) + (
                size / self._devices[spec.device]
            )
            self._device_free_s[spec.device] = shared
            end = max(end, shared)
        lane.free_s = end
        fault = self._fault(move) if self._fault is not None else None
        failure = fault.failure if fault is not None else None
        end += spec.latency_s + (fault.delay_s if fault is not None else 0.0)
        if move.source is GPU and move.destination is NVME:
            self._release(move.ticket)
        heappush(self._ends, (end, number, move, failure, end - start_s))

    def _release(self, ticket: int) -> None:
        if ticket in self._unreleased:
            self._unreleased.discard(ticket)
            self._released[ticket] = None

    def next_event_s(self) -> float | None:
        """When the next move ends, as things stand; None when nothing moves."""
        self._dispatch(self._clock.now())
        return self._ends[0][0] if self._ends else None

    def poll(self) -> list[MoveResult]:
        now, results = self._clock.now(), []
        self._dispatch(now)
        while self._ends and self._ends[0][0] <= now:
            _, _, move, failure, seconds = heappop(self._ends)
            self._unreleased.discard(move.ticket)
            self._released.pop(move.ticket, None)
            if move.ticket in self._late:
                self._late.discard(move.ticket)
                failure = MoveFailure.LATE
            if failure is None and self.landed is not None:
                self.landed(move)
            results.append(MoveResult(move.ticket, failure, seconds))
            self._dispatch(now)
        return results

    def poll_released(self) -> list[int]:
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
        until, end = self._clock.now() + timeout_s, self.next_event_s()
        self._clock.advance_to(until if end is None else min(until, end))

    def erase(self, slots: Sequence[int]) -> None:
        self._erased += [Erasure(slot, None) for slot in dict.fromkeys(slots)]

    def touch(self, slots: Sequence[int]) -> None:
        """Nothing is kept about uses."""

    def is_quarantined(self, *, is_read: bool) -> bool:
        return False

    def close(self) -> None:
        """Nothing to let go of."""
