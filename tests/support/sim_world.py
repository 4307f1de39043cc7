"""A `SimMover` with tiers whose slots hold numbers, for the suite that every mover runs."""

from __future__ import annotations

from mover_worlds import CPU, GPU, NVME, SLOTS

from tierkv.sim.clock import VirtualClock
from tierkv.sim.mover import LinkSpec, SimMover
from tierkv.types import Move, MoveFailure, TierName

LINKS = {
    (source, to): LinkSpec(1e9, 1e-5, "drive" if NVME in (source, to) else "bus")
    for source in TierName
    for to in TierName
    if source is not to
}


class SimWorld:
    """A block is one number; a move reads its source when it is staged or ends."""

    def __init__(self) -> None:
        self.tiers = [GPU, CPU, NVME]
        self._slots: dict[TierName, list[int | None]] = {t: [None] * SLOTS for t in TierName}
        self._staged: dict[int, int | None] = {}
        self.clock = VirtualClock()
        devices = {"drive": 1e9, "bus": 1.5e9}
        self.mover = SimMover(self.clock, LINKS, devices, 1 << 20, watcher=self)

    def fill(self, tier: TierName, slot: int, number: int) -> None:
        self._slots[tier][slot] = number

    def holds(self, tier: TierName, slot: int, number: int) -> bool:
        return self._slots[tier][slot] == number

    def begun(self, move: Move) -> None:
        self._slots[move.destination][move.destination_slot] = None

    def staged(self, move: Move) -> None:
        self._staged[move.ticket] = self._slots[move.source][move.source_slot]

    def ended(self, move: Move, failure: MoveFailure | None) -> MoveFailure | None:
        if failure is None:
            number = self._slots[move.source][move.source_slot]
            number = self._staged.pop(move.ticket, number)
            self._slots[move.destination][move.destination_slot] = number
        return failure

    def close(self) -> None:
        self.mover.close()
