"""What goes wrong with moves and erasures, drawn from a seed, and a mover that lets it happen.

How often depends on the *weather*, which changes while a history is played: moves fail in every
way that there is, take longer than anybody waits, or are refused because the tier is in quarantine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random

from tierkv.sim.chaos.contents import Contents, Record, ends
from tierkv.sim.chaos.log import Log
from tierkv.sim.clock import VirtualClock
from tierkv.sim.mover import GPU, NVME, Fault, Link, LinkSpec, SimMover
from tierkv.types import Erasure, Move, MoveFailure

_FROM_POOL = (MoveFailure.IO_ERROR, MoveFailure.NO_SPACE, MoveFailure.UNAVAILABLE)
_DOWN = (*_FROM_POOL, MoveFailure.LATE)
_UP = (*MoveFailure,)


@dataclass(slots=True, frozen=True)
class Weather:
    """How sick the tiers are.

    Attributes:
        failures: share of moves that fail.
        delays: share of moves that take up to `delay_s` longer.
        erase_failures: share of erasures that fail.
        is_read_closed, is_write_closed: reads from (writes to) the persistent tier are refused.
    """

    failures: float = 0.0
    delays: float = 0.0
    delay_s: float = 0.0
    erase_failures: float = 0.0
    is_read_closed: bool = False
    is_write_closed: bool = False


class Faults:
    """Draws what goes wrong.

    Args:
        rng: decides.
        weather: at first.
    """

    def __init__(self, rng: Random, weather: Weather) -> None:
        self.weather = weather
        self._rng = rng

    def of_move(self, move: Move) -> Fault | None:
        weather, rng = self.weather, self._rng
        if move.source is NVME and weather.is_read_closed:
            return Fault(0.0, MoveFailure.UNAVAILABLE)
        if move.destination is NVME and weather.is_write_closed:
            return Fault(0.0, MoveFailure.UNAVAILABLE)
        drawn = rng.random()
        if drawn < weather.failures:
            return Fault(self._delay(0.1), rng.choice(_kinds(move)))
        if drawn < weather.failures + weather.delays:
            return Fault(self._delay(1.0))
        return None

    def of_erasure(self) -> Fault:
        is_failing = self._rng.random() < self.weather.erase_failures
        failure = self._rng.choice(_FROM_POOL) if is_failing else None
        return Fault(self._delay(self.weather.delays), failure)

    def _delay(self, share: float) -> float:
        """Some time, in `share` of all cases."""
        return self._rng.random() * self.weather.delay_s if self._rng.random() < share else 0.0


def _kinds(move: Move) -> tuple[MoveFailure, ...]:
    """How such a move can fail: the pool loses nothing."""
    if move.source is GPU:
        return _FROM_POOL
    return _DOWN if move.destination is NVME else _UP


class ChaosMover(SimMover):
    """A `SimMover` whose erasures take time and fail too, and that writes a log.

    Args:
        clock, links, devices, slot_bytes: of `SimMover`.
        contents: what it moves.
        faults: what goes wrong.
        log: of all moves.
    """

    def __init__(
        self,
        clock: VirtualClock,
        links: Mapping[Link, LinkSpec],
        devices: Mapping[str, float],
        slot_bytes: int,
        contents: Contents,
        faults: Faults,
        log: Log,
    ) -> None:
        super().__init__(clock, links, devices, slot_bytes, faults.of_move, self)
        self._contents = contents
        self._faults = faults
        self._log = log
        self._erasing: list[tuple[float, int, int, MoveFailure | None, Record | None]] = []
        self._num_erasures = 0

    # ------------------------------------------------------------------ erasures

    def erase(self, slots: Sequence[int]) -> None:
        for slot in dict.fromkeys(slots):
            self._num_erasures += 1
            fault = self._faults.of_erasure()
            end, record = self._clock.now() + fault.delay_s, self._contents.store[slot]
            heappush(self._erasing, (end, self._num_erasures, slot, fault.failure, record))
        self._log.add("erase", *slots)

    def poll_erased(self) -> list[Erasure]:
        erased = []
        while self._erasing and self._erasing[0][0] <= self._clock.now():
            _, _, slot, failure, record = heappop(self._erasing)
            if failure is None:
                self._contents.erased(slot, record)
            self._log.add("erased", slot, failure.value if failure is not None else "")
            erased.append(Erasure(slot, failure))
        return erased

    def next_event_s(self) -> float | None:
        times = [self._erasing[0][0]] if self._erasing else []
        if (event := super().next_event_s()) is not None:
            times.append(event)
        return min(times, default=None)

    # ------------------------------------------------------------------ what is watched

    def begun(self, move: Move) -> None:
        name = move.key.hex()[:8] if move.tokens else "tail"
        self._log.add("move", ends(move), name, move.priority.name)
        self._contents.begun(move)

    def staged(self, move: Move) -> None:
        self._contents.staged(move)

    def ended(self, move: Move, failure: MoveFailure | None) -> MoveFailure | None:
        failure = self._contents.ended(move, failure)
        self._log.add("moved", move.ticket, failure.value if failure is not None else "")
        return failure

    def abandon(self, tickets: Sequence[int]) -> None:
        self._log.add("abandon", *tickets)
        super().abandon(tickets)

    def is_quarantined(self, *, is_read: bool) -> bool:
        weather = self._faults.weather
        return weather.is_read_closed if is_read else weather.is_write_closed
