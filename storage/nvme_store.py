"""NvmeStore: a `BlockStore` in one directory, made to survive its own process and the power.

    LOCK            flock; one owner
    MANIFEST        identity and geometry (manifest.py)
    blocks.data     slot i at i * slot_bytes: header and payload (record.py)
    index.sqlite    a copy of the headers (index.py)

write: headers and payloads of adjacent slots in one pwritev -> one fdatasync -> index rows -> DONE
read:  one preadv of [header, payload, ...]; all of it must be what the table of slots expects

Any failed write, erasure or verification leaves the session unsealed, so that the next opening
believes the headers only. `root.py` chooses the directory and keeps the capacity.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from tierkv.storage import record
from tierkv.storage.base import (
    DONE,
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
from tierkv.storage.io import IoEngine, aligned, copy, is_aligned
from tierkv.storage.recovery import erase_headers, recover
from tierkv.storage.table import SlotTable

logger = logging.getLogger(__name__)

RUN_BYTES = 16 << 20
"""Adjacent slots become one operation up to this size; larger runs go to several threads."""

_Answers = dict[int, Outcome]
_Write = tuple[SlotWrite, int]
_Read = tuple[SlotRead, StoredBlock]
_T = TypeVar("_T")
_Item = TypeVar("_Item", _Write, _Read)


class NvmeStore:
    """The blocks of one model and layout on one file system.

    Args:
        directory: locked and prepared; the store closes it.
        now: wall clock in seconds, for `last_use`.
        num_threads: operations at once within one call.
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
        self._store_id = bytes.fromhex(manifest.store_id)
        self._slot_bytes = record.slot_bytes(self.slot_payload_bytes)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tierkv-store")
        self._gate = Gate()
        self._counters = Counters(str(self.path), self.slot_payload_bytes)
        recovered = recover(self._io, self._index, manifest, self._pool)
        self._table = SlotTable(recovered.blocks, recovered.generation)
        self._session = directory.begin_session()
        self._is_sound = True
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
                self._index.put_usage(self._table.take_touched())

    def stats(self) -> StoreStats:
        return self._counters.stats()

    def close(self) -> None:
        if not self._gate.close():
            return
        self._pool.shutdown()
        self._index.put_usage(self._table.take_touched())
        if self._is_sound:
            self._index.seal(self._session, self._table.generation)
        self._directory.close()

    def _write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        generations, settled = self._table.begin({write.slot: write.key for write in batch})
        items = list(zip(batch, generations, strict=True))
        blocks: dict[int, StoredBlock] = {}
        try:
            runs = self._runs(items)
            answers = self._synced(self._each(partial(self._write_run, settled), runs))
            for write, generation in items:
                if isinstance(answers[write.slot], Done):
                    blocks[write.slot] = self._stored(write, generation)
            self._index.put(blocks.values())
        finally:
            if len(blocks) < len(batch):
                self._is_sound = False
            self._table.finish([write.slot for write in batch], blocks)
        return [answers[write.slot] for write in batch]

    def _read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        answers: _Answers = {}
        found: list[_Read] = []
        for read in batch:
            block = self._table.get(read.slot)
            if block is None or block.key != read.key:
                answers[read.slot] = Failure(Cause.NOT_FOUND)
            else:
                found.append((read, block))
        answers |= self._each(self._read_run, self._runs(found))
        for read, block in found:
            if is_corrupt(answers[read.slot]) and self._table.distrust(block):
                self._is_sound = False
        return [answers[read.slot] for read in batch]

    def _erase(self, slots: Sequence[int]) -> list[Outcome]:
        victims = self._table.begin_erase(slots)
        erased: list[int] = []
        try:
            answers = self._synced(self._each(self._erase_run, [[slot] for slot in victims]))
            erased = [slot for slot, answer in answers.items() if isinstance(answer, Done)]
            self._index.delete(erased)
        finally:
            if len(erased) < len(victims):
                self._is_sound = False
            self._table.finish(victims, dict.fromkeys(erased))
        older = [answers[slot] for slot in victims[len(slots) :]]
        failed = next((answer for answer in older if isinstance(answer, Failure)), None)
        return [failed or answers[slot] for slot in slots]

    def _write_run(self, settled: int, run: list[_Write]) -> _Answers:
        headers = aligned(len(run) * record.HEADER_BYTES)
        buffers: list[memoryview] = []
        for index, (write, generation) in enumerate(run):
            header = headers[index * record.HEADER_BYTES :][: record.HEADER_BYTES]
            record.encode(self._header(write, generation, settled), header)
            buffers += [header, self._staged(write.payload, is_write=True)]
        try:
            self._io.pwritev(buffers, run[0][0].slot * self._slot_bytes)
        except OSError as error:
            return dict.fromkeys((write.slot for write, _ in run), failure(error))
        return dict.fromkeys((write.slot for write, _ in run), DONE)

    def _read_run(self, run: list[_Read]) -> _Answers:
        headers = aligned(len(run) * record.HEADER_BYTES)
        buffers: list[memoryview] = []
        for index, (read, _) in enumerate(run):
            header = headers[index * record.HEADER_BYTES :][: record.HEADER_BYTES]
            buffers += [header, self._staged(read.out, is_write=False)]
        try:
            count = self._io.preadv(buffers, run[0][0].slot * self._slot_bytes)
        except OSError as error:
            return dict.fromkeys((read.slot for read, _ in run), failure(error))
        answers: _Answers = {}
        for index, (read, block) in enumerate(run):
            if count < (index + 1) * self._slot_bytes:
                answers[read.slot] = Failure(Cause.SHORT_READ)
            else:
                answers[read.slot] = self._verified(read, block, *buffers[2 * index :][:2])
        return answers

    def _verified(
        self, read: SlotRead, block: StoredBlock, header: memoryview, payload: memoryview
    ) -> Outcome:
        """Compare what was read with the table; fill `out` if it was not read in place."""
        found = record.decode(header, self._store_id, read.slot)
        if isinstance(found, Failure):
            return Failure(Cause.CORRUPT, found.detail)
        expected = (block.key, block.parent, block.tokens, block.generation)
        if (found.key, found.parent, found.tokens, found.generation) != expected:
            return Failure(Cause.CORRUPT, f"generation {found.generation} of another write")
        if record.digest(payload[: self.slot_payload_bytes]) != found.payload_digest:
            return Failure(Cause.CORRUPT, "payload checksum")
        if payload is not read.out:
            copy(read.out, payload[: self.slot_payload_bytes])
        return DONE

    def _erase_run(self, run: list[int]) -> _Answers:
        try:
            erase_headers(self._io, run, self._slot_bytes)
        except OSError as error:
            return dict.fromkeys(run, failure(error))
        return dict.fromkeys(run, DONE)

    def _synced(self, answers: _Answers) -> _Answers:
        """Make what was written durable; if that fails, nothing was."""
        if any(isinstance(answer, Done) for answer in answers.values()):
            try:
                self._io.sync()
            except OSError as error:
                return dict.fromkeys(answers, failure(error))
        return answers

    def _header(self, write: SlotWrite, generation: int, settled: int) -> record.Header:
        return record.Header(
            self._store_id,
            write.key,
            write.parent,
            write.slot,
            generation,
            settled,
            self.slot_payload_bytes,
            record.digest(write.payload),
            write.tokens,
        )

    def _stored(self, write: SlotWrite, generation: int) -> StoredBlock:
        fields = (write.slot, write.key, write.parent, write.tokens, generation)
        return StoredBlock(*fields, hits=0, last_use=self._now())

    def _staged(self, payload: memoryview, is_write: bool) -> memoryview:
        """The payload itself if the engine can use it in place, else aligned memory for it."""
        fits = payload.nbytes % record.ALIGNMENT == 0
        if fits and (not self._io.is_direct or is_aligned(payload)):
            return payload
        staging = aligned(record.padded(payload.nbytes))
        if is_write:
            copy(staging[: payload.nbytes], payload)
        return staging

    def _runs(self, items: Sequence[_Item]) -> list[list[_Item]]:
        """The items in runs of adjacent slots, none longer than RUN_BYTES."""
        longest = max(1, RUN_BYTES // self._slot_bytes)
        runs: list[list[_Item]] = []
        for item in sorted(items, key=lambda item: item[0].slot):
            last = runs[-1] if runs else None
            if last and last[-1][0].slot + 1 == item[0].slot and len(last) < longest:
                last.append(item)
            else:
                runs.append([item])
        return runs

    def _each(self, work: Callable[[list[_T]], _Answers], runs: list[list[_T]]) -> _Answers:
        """Do all runs, several at once, and join their answers."""
        parts = map(work, runs) if len(runs) == 1 else self._pool.map(work, runs)
        return {slot: answer for part in parts for slot, answer in part.items()}


def is_corrupt(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.cause is Cause.CORRUPT


def failure(error: OSError) -> Failure:
    """What an error of the file system means to a caller."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Failure(Cause.NO_SPACE if is_full else Cause.IO_ERROR, str(error))
