"""Keys of blocks that are gone, remembered for a while and never more than a limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from tierkv.policies.base import Key


class Ghosts:
    """A first-in first-out set of keys."""

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def add(self, key: Key, limit: int) -> None:
        """Remember the key as the newest of at most `limit`."""
        self._keys.pop(key, None)
        self._keys[key] = None
        self.trim(limit)

    def discard(self, key: Key) -> bool:
        """Forget the key; whether it was there."""
        return self._keys.pop(key, self) is None

    def trim(self, limit: int) -> None:
        """Forget the oldest beyond `limit`."""
        while len(self._keys) > max(0, limit):
            del self._keys[next(iter(self._keys))]


V = TypeVar("V")


class GhostValues(Generic[V]):
    """A first-in first-out map of keys, with something to remember for each."""

    def __init__(self) -> None:
        self._values: dict[Key, V] = {}

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: Key, value: V, limit: int) -> list[V]:
        """Remember the key as the newest of at most `limit`; the values that are forgotten."""
        gone = [self._values.pop(key)] if key in self._values else []
        self._values[key] = value
        while len(self._values) > max(0, limit):
            gone.append(self._values.pop(next(iter(self._values))))
        return gone

    def newest(self) -> Iterator[V]:
        """What is remembered, the newest first."""
        return iter(reversed(self._values.values()))

    def pop(self, key: Key) -> V | None:
        """Forget the key; what was remembered for it."""
        return self._values.pop(key, None)
