"""How often keys were seen lately, in a fixed small space (count-min sketch with aging).

    add:       of the key's four counters raise the smallest ones (conservative update), up to 15
    estimate:  the smallest of the four; never below the true count since the last halving
    aging:     after `sample` additions per key of capacity, every counter is halved

Cormode and Muthukrishnan 2005; aging as in TinyLFU (Einziger et al., ACM TOS 2017). Hashes do not
depend on the process, so that the same calls give the same counts everywhere.
"""

from __future__ import annotations

from zlib import crc32

from tierkv.policies.base import Key

NUM_ROWS = 4
MAX_COUNT = 15
COUNTERS_PER_KEY = 4
_HALVES = bytes(i // 2 for i in range(256))
_MASK = 2**64 - 1


class FrequencySketch:
    """Counts for about `capacity` keys; grows when told of more.

    Args:
        sample: additions per key of capacity until the counts are halved.
    """

    def __init__(self, sample: int = 10) -> None:
        self._sample = sample
        self._width = 64
        self._rows = [bytearray(self._width) for _ in range(NUM_ROWS)]
        self._num_added = 0

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` keys; every estimate stays as it was."""
        while self._width < COUNTERS_PER_KEY * capacity:
            self._rows = [row + row for row in self._rows]
            self._width *= 2

    def add(self, key: Key) -> None:
        """Count the key once."""
        spots = self._spots(key)
        counts = [row[spot] for row, spot in zip(self._rows, spots, strict=True)]
        least = min(counts)
        if least < MAX_COUNT:
            for row, spot, count in zip(self._rows, spots, counts, strict=True):
                if count == least:
                    row[spot] = least + 1
        self._num_added += 1
        if self._num_added >= self._sample * self._width // COUNTERS_PER_KEY:
            self._num_added //= 2
            self._rows = [row.translate(_HALVES) for row in self._rows]

    def estimate(self, key: Key) -> int:
        """How often the key was counted, older times halved; may be too high."""
        return min(row[spot] for row, spot in zip(self._rows, self._spots(key), strict=True))

    def _spots(self, key: Key) -> list[int]:
        if isinstance(key, bytes):
            number = int.from_bytes(key[:8], "little")
        else:
            number = key if isinstance(key, int) else crc32(repr(key).encode())
        mixed = (number * 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93) & _MASK
        step = (mixed >> 32) | 1
        last = self._width - 1
        return [(mixed + i * step) & last for i in range(NUM_ROWS)]
