"""A tier that keeps failing is left alone for a while, and comes back by itself.

    healthy --threshold calls in a row fail--> quarantined: calls answer QUARANTINED at once
    quarantined --pause over--> one call is let through as a probe; the others still wait
    probe succeeds --> healthy          probe fails --> quarantined, the pause doubles up to a bound

Reads and writes are judged separately: a full or read-only file system still serves reads.
Erasing is never refused. A call that takes longer than `slow_s` counts as failed, though its
answers stand; one that never reached the device (NOT_FOUND only) proves nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tierkv.storage.base import (
    BlockStore,
    Cause,
    Done,
    Failure,
    Outcome,
    SlotRead,
    SlotWrite,
)
from tierkv.storage.wrapper import StoreWrapper

logger = logging.getLogger(__name__)

SICK = frozenset({Cause.CORRUPT, Cause.SHORT_READ, Cause.IO_ERROR, Cause.NO_SPACE, Cause.LATE})
"""Causes that speak against the tier."""


@dataclass(frozen=True, slots=True)
class QuarantineLimits:
    """When a tier is sick.

    Attributes:
        threshold: failed calls in a row.
        first_pause_s, max_pause_s: how long it is left alone, at first and at most.
        slow_s: a call that takes longer counts as failed.
    """

    threshold: int = 3
    first_pause_s: float = 1.0
    max_pause_s: float = 60.0
    slow_s: float = 10.0


class Breaker:
    """The state of one direction. `now` is any clock in seconds that does not go back."""

    def __init__(self, name: str, limits: QuarantineLimits, now: Callable[[], float]) -> None:
        self._name, self._limits, self._now = name, limits, now
        self._lock = threading.Lock()
        self._num_failed = 0
        self._pause_s = limits.first_pause_s
        self._closed_until: float | None = None

    @property
    def is_quarantined(self) -> bool:
        return self._closed_until is not None

    def run(self, call: Callable[[], list[Outcome]], num_items: int) -> list[Outcome]:
        """Make the call, or refuse it."""
        if not self._admits():
            return [Failure(Cause.QUARANTINED)] * num_items
        start = self._now()
        outcomes = call()
        sick = [o.cause.value for o in outcomes if isinstance(o, Failure) and o.cause in SICK]
        if self._now() - start > self._limits.slow_s:
            sick.append("too slow")
        if sick or any(isinstance(outcome, Done) for outcome in outcomes):
            self._judge(sick)
        return outcomes

    def _admits(self) -> bool:
        """Whether a call may go through; a probe also takes the turn of those that follow it."""
        with self._lock:
            if self._closed_until is None:
                return True
            if self._now() < self._closed_until:
                return False
            self._closed_until = self._now() + max(self._pause_s, self._limits.slow_s)
            return True

    def _judge(self, complaints: list[str]) -> None:
        with self._lock:
            if not complaints:
                if self._closed_until is not None:
                    logger.warning("%s: works again", self._name)
                self._num_failed, self._pause_s = 0, self._limits.first_pause_s
                self._closed_until = None
                return
            self._num_failed += 1
            if self._closed_until is not None:
                self._pause_s = min(2 * self._pause_s, self._limits.max_pause_s)
            elif self._num_failed >= self._limits.threshold:
                text = "%s: left alone, %d calls in a row failed (%s)"
                logger.warning(text, self._name, self._num_failed, complaints[0])
            else:
                return
            self._closed_until = self._now() + self._pause_s


class QuarantinedStore(StoreWrapper):
    """A `BlockStore` with a `Breaker` for each direction in front of it.

    Args:
        inner: the store; closed with this one.
        now: a clock that does not go back.
        limits: when it is sick.
    """

    def __init__(
        self,
        inner: BlockStore,
        now: Callable[[], float],
        limits: QuarantineLimits | None = None,
    ) -> None:
        limits = limits or QuarantineLimits()
        super().__init__(inner)
        self.reads = Breaker("reads from the store", limits, now)
        self.writes = Breaker("writes to the store", limits, now)

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        return self.writes.run(lambda: self._inner.write(batch), len(batch))

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        return self.reads.run(lambda: self._inner.read(batch), len(batch))
