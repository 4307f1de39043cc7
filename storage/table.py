"""Which block every slot holds, as far as the store knows: the headers, in memory.

    generation   one number per write of a slot, over the whole store; never repeats
    in flight    slots between `begin` and `finish`: being written or erased; a read finds nothing
    settled      the highest generation below which no write is in flight (see record.py)
    in doubt     slots in flight, and slots whose write, erasure or verification failed: on the
                 device may be the old block, the new one or neither, so nothing is offered, and
                 an erasure of either key includes them

One lock, held for moments, never during I/O.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from tierkv.errors import InvariantError
from tierkv.storage.base import StoredBlock


class SlotTable:
    """The blocks of one store by slot and by key.

    Args:
        blocks: what is known at the start.
        generation: the highest generation used so far.
    """

    def __init__(self, blocks: Iterable[StoredBlock] = (), generation: int = 0) -> None:
        self._changed = threading.Condition()
        self._blocks: dict[int, StoredBlock] = {}
        self._holders: dict[bytes, set[int]] = {}
        self._in_flight: dict[int, int] = {}
        self._doubt: dict[int, set[bytes]] = {}
        self._touched: set[int] = set()
        self.generation = generation
        for block in blocks:
            self._put(block)

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, slot: int) -> StoredBlock | None:
        return self._blocks.get(slot)

    def begin(self, keys: Mapping[int, bytes]) -> tuple[list[int], int]:
        """Take slots out for writing these keys: their new generations, and what is settled.

        Raises:
            InvariantError: one of them is in flight already; nothing is changed then.
        """
        with self._changed:
            self._check_idle(keys)
            first, self.generation = self.generation + 1, self.generation + len(keys)
            settled = min(self._in_flight.values(), default=first) - 1
            generations = list(range(first, first + len(keys)))
            for (slot, key), generation in zip(keys.items(), generations, strict=True):
                self._take(slot, generation).add(key)
                self._holders.setdefault(key, set()).add(slot)
            return generations, settled

    def begin_erase(self, slots: Sequence[int]) -> list[int]:
        """Take slots out for erasing, and with them older copies of the same keys.

        Waits while such a copy is in flight, because only then it is known which is older.

        Raises:
            InvariantError: one of `slots` is in flight already; nothing is changed then.
        """
        with self._changed:
            self._check_idle(slots)
            while self._in_flight.keys() & (victims := self._with_older(slots)):
                self._changed.wait()
                self._check_idle(slots)
            for slot in victims:
                self._take(slot, self.generation + 1)
            return list(victims)

    def finish(self, slots: Iterable[int], sure: Mapping[int, StoredBlock | None]) -> None:
        """The slots are idle again. `sure` says what some hold now; the others stay in doubt."""
        with self._changed:
            for slot in slots:
                del self._in_flight[slot]
            for slot, block in sure.items():
                for key in self._doubt.pop(slot):
                    self._holders[key].discard(slot)
                    if not self._holders[key]:
                        del self._holders[key]
                if block is not None:
                    self._put(block)
            self._changed.notify_all()

    def distrust(self, block: StoredBlock) -> bool:
        """The slot does not hold what it should; whether it was still thought to."""
        with self._changed:
            current = self._blocks.get(block.slot)
            if current is None or current.generation != block.generation:
                return False
            self._doubt[block.slot] = {self._blocks.pop(block.slot).key}
            return True

    def touch(self, slots: Sequence[int], now: float) -> None:
        with self._changed:
            for slot in slots:
                block = self._blocks.get(slot)
                if block is not None:  # `_replace` costs three times as much
                    self._blocks[slot] = StoredBlock(*block[:5], block.hits + 1, now)
                    self._touched.add(slot)

    def take_touched(self) -> list[StoredBlock]:
        """Blocks whose statistics changed since the last call."""
        with self._changed:
            touched, self._touched = self._touched, set()
            return [self._blocks[slot] for slot in touched if slot in self._blocks]

    def newest(self) -> list[StoredBlock]:
        """All blocks by slot; of equal keys the one with the highest generation."""
        with self._changed:
            ordered = sorted(self._blocks.values(), key=lambda block: block.generation)
        by_key = {block.key: block for block in ordered}
        return sorted(by_key.values())

    def _check_idle(self, slots: Iterable[int]) -> None:
        busy = self._in_flight.keys() & set(slots)
        if busy:
            raise InvariantError(f"slots {sorted(busy)} are being written or erased already")

    def _with_older(self, slots: Sequence[int]) -> dict[int, None]:
        victims = dict.fromkeys(slots)
        for block in [self._blocks[slot] for slot in slots if slot in self._blocks]:
            for holder in self._holders[block.key]:
                rival = self._blocks.get(holder)
                if rival is None or rival.generation < block.generation:
                    victims[holder] = None
        return victims

    def _put(self, block: StoredBlock) -> None:
        self._blocks[block.slot] = block
        self._holders.setdefault(block.key, set()).add(block.slot)

    def _take(self, slot: int, generation: int) -> set[bytes]:
        """Mark the slot in flight; returns the keys that may be on the device there."""
        self._in_flight[slot] = generation
        block = self._blocks.pop(slot, None)
        doubt = self._doubt.setdefault(slot, set())
        if block is not None:
            doubt.add(block.key)
        return doubt
