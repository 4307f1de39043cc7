"""A mover over a `Ledger`: copies happen when it likes, in any order, and some of them fail."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ledger import Ledger, ManualClock

from tierkv.types import Erasure, Move, MoveFailure, MoveResult, TierName

GPU, NVME = TierName.GPU, TierName.NVME
Row = list[int | None]


class LedgerMover:
    """Moves rows of the ledger's pool to lists that stand for lower tiers, and back.

    Args:
        ledger: its pool is the GPU tier.
        capacities: slots of the lower tiers.
        seed: of which moves end when.
        failures: share of moves that fail.
        is_eager: every move ends at the next poll.
        is_ordered: moves end in the order in which they began.
    """

    def __init__(
        self,
        ledger: Ledger,
        capacities: dict[TierName, int],
        clock: ManualClock,
        seed: int = 0,
        failures: float = 0.0,
        is_eager: bool = False,
        is_ordered: bool = False,
    ) -> None:
        empty: Row = [None] * ledger.block_size
        self.tiers: dict[TierName, list[Row]] = {
            name: [list(empty) for _ in range(count)] for name, count in capacities.items()
        }
        self.tiers[GPU] = ledger.pool
        self.pending: list[Move] = []
        self.erased: list[int] = []
        self.touched: list[int] = []
        self._staged: dict[int, Row] = {}
        self._abandoned: set[int] = set()
        self._given_up: set[int] = set()
        self._erasures: list[Erasure] = []
        self._results: list[MoveResult] = []
        self._clock = clock
        self._random = random.Random(seed)
        self._failures = failures
        self._is_eager = is_eager
        self._is_ordered = is_ordered

    def begin(self, moves: Sequence[Move]) -> None:
        self.pending.extend(moves)
        if not self._is_ordered:
            self._random.shuffle(self.pending)

    def poll(self) -> list[MoveResult]:
        count = len(self.pending) if self._is_eager else self._random.randint(0, len(self.pending))
        done, self.pending = self.pending[:count], self.pending[count:]
        results = [*self._results, *map(self._copy, done)]
        self._results = []
        return results

    def poll_released(self) -> list[int]:
        """Some of what goes from the pool to the disk is staged, and the rest is not yet."""
        released = []
        for move in self.pending:
            can_be = (move.source, move.destination) == (GPU, NVME)
            if can_be and move.ticket not in self._staged and self._random.random() < 0.5:
                self._staged[move.ticket] = list(self.tiers[GPU][move.source_slot])
                released.append(move.ticket)
            elif move.ticket in self._abandoned and self._random.random() < 0.5:
                self._abandoned.remove(move.ticket)
                self._given_up.add(move.ticket)
                released.append(move.ticket)
        return released

    def abandon(self, tickets: Sequence[int]) -> None:
        self._abandoned.update(set(tickets) - self._given_up)

    def poll_erased(self) -> list[Erasure]:
        erasures, self._erasures = self._erasures, []
        return erasures

    def _copy(self, move: Move) -> MoveResult:
        staged = self._staged.pop(move.ticket, None)
        if move.ticket in self._given_up:
            return MoveResult(move.ticket, MoveFailure.LATE, 0.01)
        if self._random.random() < self._failures:
            self._spoil(move)
            kinds = [MoveFailure.IO_ERROR, MoveFailure.CORRUPT]
            if move.source is GPU:
                kinds = [MoveFailure.NO_SPACE, MoveFailure.UNAVAILABLE]
            return MoveResult(move.ticket, self._random.choice(kinds), 0.01)
        data = staged or self.tiers[move.source][move.source_slot]
        self.tiers[move.destination][move.destination_slot][:] = data
        return MoveResult(move.ticket, None, 0.01)

    def _spoil(self, move: Move) -> None:
        """A failed move leaves anything in its destination."""
        row = self.tiers[move.destination][move.destination_slot]
        row[:] = [-1] * len(row)

    def wait(self, timeout_s: float) -> None:
        self._clock.time += timeout_s
        if self.pending:
            self._results.append(self._copy(self.pending.pop(0 if self._is_ordered else -1)))

    def erase(self, slots: Sequence[int]) -> None:
        self.erased.extend(slots)
        self._erasures.extend(Erasure(slot, None) for slot in dict.fromkeys(slots))

    def touch(self, slots: Sequence[int]) -> None:
        self.touched.extend(slots)

    def is_quarantined(self, *, is_read: bool) -> bool:
        return False

    def close(self) -> None:
        self.pending.clear()
