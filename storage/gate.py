"""Closing a store that other threads are using."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tierkv.storage.base import Cause, Failure, Outcome


def closed(batch: Sequence[object]) -> list[Outcome]:
    """The answers of a store that is closed."""
    return [Failure(Cause.CLOSED)] * len(batch)


class Gate:
    """Counts the calls inside; closing refuses new ones and waits for those."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = 0
        self._is_open = True

    @contextmanager
    def entered(self) -> Iterator[bool]:
        """Inside the block the store is not closed, if the answer is True."""
        with self._changed:
            is_open = self._is_open
            self._num_inside += is_open
        try:
            yield is_open
        finally:
            with self._changed:
                self._num_inside -= is_open
                self._changed.notify_all()

    def close(self) -> bool:
        """Returns whether this call closed it, once nobody is inside."""
        with self._changed:
            was_open, self._is_open = self._is_open, False
            self._changed.wait_for(lambda: self._num_inside == 0)
            return was_open
