"""Blocks of the persistent tier that were forgotten and must not come back at the next start.

    begin     the mover is asked to erase the slots
    failed    the device refused: what was in the slot may still be there
    settled   the erasure is durable, or another block has been written over it

With the slots of forgotten blocks go those whose blocks had been dropped before: a dropped block's
bytes stay until others are written over them. A slot that failed is erased again, after a pause
that doubles, unless it is in use by then. Until it is settled it counts as open, so whoever relies
on forgetting can see that it has not happened.
"""

from __future__ import annotations

import logging

from tierkv.cache.residency import Tier
from tierkv.protocols import Clock, Mover
from tierkv.types import MoveFailure

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0
_MAX_PAUSE_S = 60.0


class Erasures:
    """Slots that are being erased, and those where it failed.

    Args:
        mover: erases.
        tier: the persistent tier; its empty slots may be erased at any time.
        leftovers: slots where a dropped block's bytes may still be; whoever drops one adds it.
        clock: for the pauses.

    Attributes:
        num_failures: attempts that failed, by slot.
    """

    def __init__(self, mover: Mover, tier: Tier, leftovers: set[int], clock: Clock) -> None:
        self.num_failures = 0
        self._mover = mover
        self._tier = tier
        self._leftovers = leftovers
        self._clock = clock
        self._begun: set[int] = set()
        self._failed: dict[int, MoveFailure] = {}
        self._pause_s = _FIRST_PAUSE_S
        self._retry_at_s = 0.0

    @property
    def num_begun(self) -> int:
        """Erasures whose end is not known yet."""
        return len(self._begun)

    @property
    def num_open(self) -> int:
        """Slots whose old block could still be there at the next start."""
        return len(self._begun | self._failed.keys())

    def begin(self, slots: list[int]) -> None:
        """Erase slots, none of which a move uses, and what is left over in empty ones."""
        empty = set(self._tier.empty_slots)
        self._erase({*slots, *(empty & (self._leftovers | self._failed.keys()))})

    def poll(self) -> None:
        """Take notice of what has ended, and try again what failed some time ago."""
        for erasure in self._mover.poll_erased():
            self._begun.discard(erasure.slot)
            if erasure.failure is None:
                self._leftovers.discard(erasure.slot)
            else:
                self._note_failure(erasure.slot, erasure.failure)
        if not self.num_open:
            self._pause_s = _FIRST_PAUSE_S
        elif self._failed and self._clock.now() >= self._retry_at_s:
            self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
            self._retry_at_s = self._clock.now() + self._pause_s
            self.retry()

    def retry(self) -> None:
        """Erase again what failed, but slots that are in use by now."""
        self._erase(self._failed.keys() & set(self._tier.empty_slots))

    def _erase(self, slots: set[int]) -> None:
        if slots:
            self._failed = {s: cause for s, cause in self._failed.items() if s not in slots}
            self._begun |= slots
            self._mover.erase(sorted(slots))

    def write_ended(self, slot: int, *, is_written: bool) -> None:
        """A write into the slot ended: what had been there is gone, or it failed."""
        self._leftovers.add(slot)  # unless it is kept: then the slot is not empty
        if is_written:
            self._failed.pop(slot, None)

    def failure(self) -> str | None:
        """Why what was forgotten may come back, for people; None when it cannot."""
        if not self.num_open:
            return None
        if self._begun:
            return f"{len(self._begun)} blocks are not erased yet"
        causes = sorted({cause.value for cause in self._failed.values()})
        return f"{len(self._failed)} blocks could not be erased ({', '.join(causes)})"

    def _note_failure(self, slot: int, failure: MoveFailure) -> None:
        self.num_failures += 1
        if not self._failed and self._pause_s == _FIRST_PAUSE_S:
            logger.warning("erasing stored blocks failed (%s); it is tried again", failure.value)
        if not self._failed:
            self._retry_at_s = self._clock.now() + self._pause_s
        self._failed[slot] = failure
