"""What happened in a run, in order: to be read, and to be compared by a hash."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from tierkv.sim.clock import VirtualClock

Word = str | int | float | None


class Log:
    """Events with the virtual time of each.

    Args:
        clock: of the run.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._events: list[tuple[float, str, tuple[Word, ...]]] = []

    def __len__(self) -> int:
        return len(self._events)

    def add(self, what: str, *words: Word) -> None:
        self._events.append((self._clock.now(), what, words))

    def lines(self) -> Iterator[str]:
        """One for each event, for people."""
        for time_s, what, words in self._events:
            yield f"{time_s:12.6f}  {what:8s} " + " ".join(map(str, words))

    def digest(self) -> str:
        """Equal for equal runs."""
        state = blake2b(digest_size=16)
        for event in self._events:
            state.update(repr(event).encode())
        return state.hexdigest()
