"""A mover over a `Ledger`: copies happen when it likes, in any order, and some of them fail."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ledger import Ledger, ManualClock

from tierkv.types import Move, MoveFailure, MoveResult, TierName

GPU = TierName.GPU
Rows = list[list[int | None]]


class LedgerMover:
    """Moves rows of the ledger's pool to lists that stand for lower tiers, and back.

    Args:
        ledger: its pool is the GPU tier.
        capacities: slots of the lower tiers.
        seed: of which moves end when.
        failures: share of moves that fail.
        is_eager: every move ends at the next poll.
    """

    def __init__(
        self,
        ledger: Ledger,
        capacities: dict[TierName, int],
        clock: ManualClock,
        seed: int = 0,
        failures: float = 0.0,
        is_eager: bool = False,
    ) -> None:
        empty: list[int | None] = [None] * ledger.block_size
        self.tiers: dict[TierName, Rows] = {
            name: [list(empty) for _ in range(count)] for name, count in capacities.items()
        }
        self.tiers[GPU] = ledger.pool
        self.pending: list[Move] = []
        self.erased: list[int] = []
        self._results: list[MoveResult] = []
        self._clock = clock
        self._random = random.Random(seed)
        self._failures = failures
        self._is_eager = is_eager

    def begin(self, moves: Sequence[Move]) -> None:
        self.pending.extend(moves)
        self._random.shuffle(self.pending)

    def poll(self) -> list[MoveResult]:
        count = len(self.pending) if self._is_eager else self._random.randint(0, len(self.pending))
        done, self.pending = self.pending[:count], self.pending[count:]
        results = [*self._results, *map(self._copy, done)]
        self._results = []
        return results

    def _copy(self, move: Move) -> MoveResult:
        if self._random.random() < self._failures:
            self._spoil(move)
            kinds = [MoveFailure.IO_ERROR, MoveFailure.CORRUPT]
            if move.source is GPU:
                kinds = [MoveFailure.NO_SPACE, MoveFailure.UNAVAILABLE]
            return MoveResult(move.ticket, self._random.choice(kinds), 0.01)
        data = self.tiers[move.source][move.source_slot]
        self.tiers[move.destination][move.destination_slot][:] = data
        return MoveResult(move.ticket, None, 0.01)

    def _spoil(self, move: Move) -> None:
        """A failed move leaves anything in its destination."""
        row = self.tiers[move.destination][move.destination_slot]
        row[:] = [-1] * len(row)

    def wait(self, timeout_s: float) -> None:
        self._clock.time += timeout_s
        if self.pending:
            self._results.append(self._copy(self.pending.pop()))

    def erase(self, slots: Sequence[int]) -> None:
        self.erased.extend(slots)

    def close(self) -> None:
        self.pending.clear()
