"""NvmeStore: a `BlockStore` in one directory, made to survive its own process and the power.

    LOCK            flock; one owner
    MANIFEST        identity and geometry (manifest.py)
    blocks.data     slot i at i * slot_bytes: header and payload (record.py)
    index.sqlite    a copy of the headers (index.py)

write: headers and payloads, adjacent slots in one operation -> one fdatasync -> DONE; index rows
       follow in the background
read:  headers and payloads; all of it must be what the table of slots expects

Any failed write, erasure or verification leaves the session unsealed, so that the next opening
believes the headers only. `root.py` chooses the directory and keeps the capacity.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tierkv.storage.base import (
    Cause,
    Done,
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
from tierkv.storage.directory import OpenDirectory, StoreSpec, refusal
from tierkv.storage.gate import Gate, closed
from tierkv.storage.io import IoEngine
from tierkv.storage.recovery import recover
from tierkv.storage.slot_io import SlotIo, failure
from tierkv.storage.table import SlotTable

logger = logging.getLogger(__name__)

MOST_NOTED = 1 << 14
"""Index rows that wait in memory, before they are written out in the background."""

_NOT_FOUND = Failure(Cause.NOT_FOUND)


class NvmeStore:
    """The blocks of one model and layout on one file system.

    Args:
        directory: locked and prepared; the store closes it.
        now: wall clock in seconds, for `last_use`.
        num_threads: for large operations, and for engines without a queue (io_queue.py).
    """

    def __init__(
        self,
        directory: OpenDirectory,
        now: Callable[[], float] = time.time,
        num_threads: int = 4,
    ) -> None:
        manifest = directory.manifest
        self.path: Path = directory.path
        self.slot_payload_bytes, self.capacity = manifest.payload_bytes, manifest.capacity
        self._directory, self._now = directory, now
        self._io: IoEngine = directory.io
        self._index = directory.index
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tierkv-store")
        store_id = bytes.fromhex(manifest.store_id)
        self._slots = SlotIo(self._io, self._threads, store_id, self.slot_payload_bytes)
        self._gate = Gate()
        self._counters = Counters(str(self.path), self.slot_payload_bytes)
        recovered = recover(self._io, self._index, manifest, self._threads)
        self._table = SlotTable(recovered.blocks, recovered.generation)
        self._session = directory.begin_session()
        self._is_sound = True
        self._written_out: Future[None] | None = None
        text = "%s: %d of %d slots hold blocks, from %s"
        logger.info(text, self.path, len(self._table), self.capacity, recovered.source)

    @classmethod
    def start(cls, directory: OpenDirectory, now: Callable[[], float] = time.time) -> NvmeStore:
        """Recover what the directory holds; it is closed if that fails.

        Raises:
            ConfigError: the file system refuses.
        """
        try:
            return cls(directory, now)
        except BaseException as error:
            directory.close()
            if not isinstance(error, OSError):
                raise
            manifest = directory.manifest
            spec = StoreSpec(manifest.fingerprint, manifest.payload_bytes, manifest.capacity)
            raise refusal(directory.path, spec, error) from error

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        check_writes(self, batch)
        with self._gate.entered() as is_open:
            outcomes = self._write(batch) if is_open else closed(batch)
        return self._counters.count("writes", outcomes)

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        check_reads(self, batch)
        with self._gate.entered() as is_open:
            outcomes = self._read(batch) if is_open else closed(batch)
        return self._counters.count("reads", outcomes)

    def erase(self, slots: Sequence[int]) -> list[Outcome]:
        check_slots(self, slots)
        with self._gate.entered() as is_open:
            outcomes = self._erase(slots) if is_open else closed(slots)
        return self._counters.count("erases", outcomes)

    def recover(self) -> list[StoredBlock]:
        return self._table.newest()

    def touch(self, slots: Sequence[int]) -> None:
        self._table.touch(slots, self._now())

    def flush(self) -> None:
        with self._gate.entered() as is_open:
            if is_open:
                self._write_out()

    def stats(self) -> StoreStats:
        return self._counters.stats()

    def close(self) -> None:
        if not self._gate.close():
            return
        self._threads.shutdown()
        self._slots.close()
        self._write_out()
        if self._is_sound:
            self._index.seal(self._session, self._table.generation)
        self._directory.close()

    def _write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        generations, settled = self._table.begin({write.slot: write.key for write in batch})
        blocks: dict[int, StoredBlock] = {}
        try:
            outcomes = self._synced(self._slots.write(batch, generations, settled))
            now = self._now()
            for write, generation, outcome in zip(batch, generations, outcomes, strict=True):
                if isinstance(outcome, Done):
                    fields = (write.slot, write.key, write.parent, write.tokens, generation)
                    blocks[write.slot] = StoredBlock(*fields, hits=0, last_use=now)
            self._index.put(blocks)
            self._write_out_soon()
        finally:
            if len(blocks) < len(batch):
                self._is_sound = False
            self._table.finish([write.slot for write in batch], blocks)
        return outcomes

    def _read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        blocks = [self._table.get(read.slot) for read in batch]
        held = [
            (read, block)
            for read, block in zip(batch, blocks, strict=True)
            if block is not None and block.key == read.key
        ]
        found = self._slots.read([read for read, _ in held], [block for _, block in held])
        outcomes: dict[int, Outcome] = {}
        for (read, block), outcome in zip(held, found, strict=True):
            outcomes[read.slot] = outcome
            if is_corrupt(outcome) and self._table.distrust(block):
                self._is_sound = False
        return [outcomes.get(read.slot, _NOT_FOUND) for read in batch]

    def _erase(self, slots: Sequence[int]) -> list[Outcome]:
        victims = self._table.begin_erase(slots)
        erased: list[int] = []
        try:
            outcomes = self._synced(self._slots.erase(victims))
            answered = zip(victims, outcomes, strict=True)
            erased = [slot for slot, outcome in answered if isinstance(outcome, Done)]
            self._index.delete(erased)
        finally:
            if len(erased) < len(victims):
                self._is_sound = False
            self._table.finish(victims, dict.fromkeys(erased))
        older = outcomes[len(slots) :]
        failed = next((outcome for outcome in older if isinstance(outcome, Failure)), None)
        return [failed or outcome for outcome in outcomes[: len(slots)]]

    def _synced(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Make what was written durable; if that fails, nothing was."""
        if any(isinstance(outcome, Done) for outcome in outcomes):
            try:
                self._io.sync()
            except OSError as error:
                return [failure(error)] * len(outcomes)
        return outcomes

    def _write_out_soon(self) -> None:
        is_busy = self._written_out is not None and not self._written_out.done()
        if self._index.num_noted >= MOST_NOTED and not is_busy:
            self._written_out = self._threads.submit(self._write_out)

    def _write_out(self) -> None:
        """Bring the index up to date."""
        touched = self._table.take_touched()
        self._index.write_out()
        self._index.put_usage(touched)


def is_corrupt(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.cause is Cause.CORRUPT
