"""MemStore: a `BlockStore` in host memory, for tests and simulation. It survives nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tierkv.storage.arena import HostArena
from tierkv.storage.base import (
    DONE,
    Cause,
    Failure,
    Outcome,
    SlotRead,
    SlotWrite,
    StoredBlock,
    StoreStats,
    check_reads,
    check_slots,
    check_writes,
)
from tierkv.storage.counters import Counters
from tierkv.storage.gate import Gate, closed
from tierkv.storage.io import copy
from tierkv.storage.table import SlotTable


class MemStore:
    """Blocks in a `HostArena`.

    Args:
        capacity: number of slots.
        payload_bytes: of each.
        now: clock for `last_use`.
    """

    def __init__(
        self, capacity: int, payload_bytes: int, now: Callable[[], float] = time.time
    ) -> None:
        self.capacity, self.slot_payload_bytes = capacity, payload_bytes
        self._arena = HostArena(capacity, payload_bytes)
        self._table = SlotTable()
        self._counters = Counters("memory", payload_bytes)
        self._gate = Gate()
        self._now = now

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        check_writes(self, batch)
        with self._gate.entered() as is_open:
            if is_open:
                self._write(batch)
            outcomes: list[Outcome] = [DONE] * len(batch) if is_open else closed(batch)
        return self._counters.count("writes", outcomes)

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        check_reads(self, batch)
        with self._gate.entered() as is_open:
            outcomes = [self._read(read) for read in batch] if is_open else closed(batch)
        return self._counters.count("reads", outcomes)

    def erase(self, slots: Sequence[int]) -> list[Outcome]:
        check_slots(self, slots)
        with self._gate.entered() as is_open:
            if is_open:
                victims = self._table.begin_erase(slots)
                self._table.finish(victims, dict.fromkeys(victims))
            outcomes: list[Outcome] = [DONE] * len(slots) if is_open else closed(slots)
        return self._counters.count("erases", outcomes)

    def recover(self) -> list[StoredBlock]:
        return self._table.newest()

    def touch(self, slots: Sequence[int]) -> None:
        self._table.touch(slots, self._now())

    def flush(self) -> None:
        """Nothing to write out."""

    def stats(self) -> StoreStats:
        return self._counters.stats()

    def close(self) -> None:
        self._gate.close()

    def _write(self, batch: Sequence[SlotWrite]) -> None:
        generations, _ = self._table.begin({write.slot: write.key for write in batch})
        now = self._now()
        blocks = {}
        for write, generation in zip(batch, generations, strict=True):
            copy(self._arena.view(write.slot), write.payload)
            fields = (write.slot, write.key, write.parent, write.tokens, generation)
            blocks[write.slot] = StoredBlock(*fields, hits=0, last_use=now)
        self._table.finish(blocks, blocks)

    def _read(self, read: SlotRead) -> Outcome:
        before = self._table.get(read.slot)
        if before is None or before.key != read.key:
            return Failure(Cause.NOT_FOUND)
        copy(read.out, self._arena.view(read.slot))
        after = self._table.get(read.slot)
        if after is None or after.generation != before.generation:
            return Failure(Cause.NOT_FOUND, "overwritten meanwhile")
        return DONE
