"""Counting what a store was asked and what became of it."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from typing import Literal

from tierkv.storage.base import Cause, Failure, Outcome, StoreStats

logger = logging.getLogger(__name__)

_EXPECTED = (Cause.NOT_FOUND, Cause.CLOSED)


class Counters:
    """The `StoreStats` of one store; the first failure of each kind is logged.

    Args:
        name: how the store is called in the log.
        payload_bytes: of one slot.
    """

    def __init__(self, name: str, payload_bytes: int) -> None:
        self._name, self._payload_bytes = name, payload_bytes
        self._stats = StoreStats()
        self._lock = threading.Lock()

    def count(
        self, verb: Literal["reads", "writes", "erases"], outcomes: list[Outcome]
    ) -> list[Outcome]:
        """Add the outcomes of one call, and return them."""
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        num_bytes = (len(outcomes) - len(failures)) * self._payload_bytes
        with self._lock:
            setattr(self._stats, verb, getattr(self._stats, verb) + len(outcomes))
            self._stats.read_bytes += num_bytes if verb == "reads" else 0
            self._stats.written_bytes += num_bytes if verb == "writes" else 0
            for failure in failures:
                self._stats.failures[failure.cause] += 1
                if self._stats.failures[failure.cause] == 1 and failure.cause not in _EXPECTED:
                    text = "%s: %s in %s (%s); counted, not logged again"
                    logger.warning(text, self._name, failure.cause.value, verb, failure.detail)
        return outcomes

    def stats(self) -> StoreStats:
        """A copy of the counters."""
        with self._lock:
            return dataclasses.replace(self._stats, failures=Counter(self._stats.failures))
