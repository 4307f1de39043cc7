"""One mover of all ranks: the same moves everywhere, and an answer when the last rank gave its own.

A rank that failed early may still be reading or writing elsewhere what the others are at, so the
slots are free only when all ranks are done. If several failed, the worst failure counts: one that
says that the source is gone outweighs one after which the source can be tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tierkv.protocols import Mover
from tierkv.types import Erasure, Move, MoveFailure, MoveResult

_LOOK_S = 0.001  # between two looks at the movers of other processes

_SEVERITY = {
    cause: rank
    for rank, cause in enumerate(
        (
            None,
            MoveFailure.LATE,
            MoveFailure.UNAVAILABLE,
            MoveFailure.NO_SPACE,
            MoveFailure.IO_ERROR,
            MoveFailure.LOST,
            MoveFailure.CORRUPT,
        )
    )
}


def worst(*failures: MoveFailure | None) -> MoveFailure | None:
    """The most severe of some failures; None when all are None."""
    return max(failures, key=_SEVERITY.__getitem__)


@dataclass(slots=True)
class _Open:
    """Ranks that have not ended a move (an erasure), and those that still use the pool for it."""

    running: set[int]
    holding: set[int]
    failure: MoveFailure | None = None
    seconds: float = 0.0
    is_announced: bool = False

    def end(self, rank: int, failure: MoveFailure | None, seconds: float = 0.0) -> None:
        self.running.discard(rank)
        self.holding.discard(rank)
        self.failure = worst(self.failure, failure)
        self.seconds = max(self.seconds, seconds)


class TpMover:
    """A `Mover` over one mover per rank.

    Args:
        movers: of the ranks in order; their slots have the same numbers and hold the same keys.
        now: a clock in seconds.
    """

    def __init__(self, movers: Sequence[Mover], now: Callable[[], float] = time.monotonic) -> None:
        self._movers, self._now = list(movers), now
        self._moves: dict[int, _Open] = {}
        self._erasing: dict[int, _Open] = {}
        self._results: list[MoveResult] = []
        self._released: dict[int, None] = {}
        self._erased: list[Erasure] = []

    def _open(self) -> _Open:
        ranks = range(len(self._movers))
        return _Open(set(ranks), set(ranks))

    def begin(self, moves: Sequence[Move]) -> None:
        self._moves |= {move.ticket: self._open() for move in moves}
        for mover in self._movers:
            mover.begin(moves)

    def poll(self) -> list[MoveResult]:
        self._collect()
        results, self._results = self._results, []
        for result in results:
            self._released.pop(result.ticket, None)
        return results

    def poll_released(self) -> list[int]:
        self._collect()
        released, self._released = list(self._released), {}
        return released

    def poll_erased(self) -> list[Erasure]:
        self._collect()
        erased, self._erased = self._erased, []
        return erased

    def abandon(self, tickets: Sequence[int]) -> None:
        for mover in self._movers:
            mover.abandon(tickets)

    def erase(self, slots: Sequence[int]) -> None:
        self._erasing |= {slot: self._open() for slot in slots}
        for mover in self._movers:
            mover.erase(slots)

    def touch(self, slots: Sequence[int]) -> None:
        for mover in self._movers:
            mover.touch(slots)

    def is_quarantined(self, *, is_read: bool) -> bool:
        return any(mover.is_quarantined(is_read=is_read) for mover in self._movers)

    def wait(self, timeout_s: float) -> None:
        end_s = self._now() + timeout_s
        while not self._has_news() and (left_s := end_s - self._now()) > 0:
            self._movers[0].wait(min(left_s, _LOOK_S))

    def _has_news(self) -> bool:
        self._collect()
        return bool(self._results or self._released or self._erased)

    def close(self) -> None:
        for mover in reversed(self._movers):  # this process's own, which takes its time, at last
            mover.close()

    # ------------------------------------------------------------------ what the ranks say

    def _collect(self) -> None:
        for rank, mover in enumerate(self._movers):
            for ticket in mover.poll_released():
                if ticket in self._moves:
                    self._moves[ticket].holding.discard(rank)
                    self._note_move(ticket)
            for result in mover.poll():
                self._moves[result.ticket].end(rank, result.failure, result.seconds)
                self._note_move(result.ticket)
            for erasure in mover.poll_erased():
                self._note_erasure(rank, erasure)

    def _note_move(self, ticket: int) -> None:
        move = self._moves[ticket]
        if not move.running:
            del self._moves[ticket]
            self._results.append(MoveResult(ticket, move.failure, move.seconds))
        elif not move.holding and not move.is_announced:
            move.is_announced = True
            self._released[ticket] = None

    def _note_erasure(self, rank: int, erasure: Erasure) -> None:
        """A slot may be erased twice, and answered once: then its entry is not there any more."""
        slot = self._erasing.get(erasure.slot)
        if slot is None:
            return
        slot.end(rank, erasure.failure)
        if not slot.running:
            del self._erasing[erasure.slot]
            self._erased.append(Erasure(erasure.slot, slot.failure))
