"""The bytes of slots on their way between memory and the file.

    write   header and payload of every slot of a run   -> one operation, not synced
    read    one operation for [header, payload, ...]    -> each compared with what is expected
    erase   zeros over a header                         -> not synced

A run is adjacent slots. A call has many operations in flight (flow.py); checksums are computed
meanwhile. Failures are answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tierkv.storage import record
from tierkv.storage.base import DONE, Cause, Failure, Outcome, SlotRead, SlotWrite, StoredBlock
from tierkv.storage.directory import FULL
from tierkv.storage.flow import DEPTH, Flow, Job
from tierkv.storage.io import IoEngine, Operation, aligned, copy, is_aligned
from tierkv.storage.io_queue import open_queue

RUN_BYTES = 1 << 20
"""Adjacent slots become one operation up to this size."""


class SlotIo:
    """Reads and writes slots of one file.

    Args:
        io: the file.
        threads: for operations that are not for the engine's own queue.
        store_id: 16 bytes, in every header.
        payload_bytes: of each slot.
    """

    def __init__(
        self, io: IoEngine, threads: ThreadPoolExecutor, store_id: bytes, payload_bytes: int
    ) -> None:
        self.store_id, self.payload_bytes = store_id, payload_bytes
        self.slot_bytes = record.slot_bytes(payload_bytes)
        self._io, self._threads = io, threads
        self._longest_run = max(1, RUN_BYTES // self.slot_bytes)
        self._idle: list[Flow] = []

    def write(
        self, batch: Sequence[SlotWrite], generations: Sequence[int], settled: int
    ) -> list[Outcome]:
        """Write slots, each with its generation; `settled` goes into all headers (record.py)."""
        outcomes: list[Outcome] = [_NOT_ENDED] * len(batch)
        runs = self._runs([write.slot for write in batch])
        self._run(_WriteRun(self, run, batch, generations, settled, outcomes) for run in runs)
        return outcomes

    def read(self, batch: Sequence[SlotRead], expected: Sequence[StoredBlock]) -> list[Outcome]:
        """Read slots and compare them with what is expected; what is DONE is in the buffers."""
        outcomes: list[Outcome] = [_NOT_ENDED] * len(batch)
        runs = self._runs([read.slot for read in batch])
        self._run(_ReadRun(self, run, batch, expected, outcomes) for run in runs)
        return outcomes

    def erase(self, slots: Sequence[int]) -> list[Outcome]:
        """Overwrite the headers of slots."""
        outcomes: list[Outcome] = [_NOT_ENDED] * len(slots)
        self._run(_Erasure(self, index, slot, outcomes) for index, slot in enumerate(slots))
        return outcomes

    def close(self) -> None:
        """Give queues back; nobody is inside."""
        for flow in self._idle:
            flow.close()

    def staged(self, payload: memoryview, is_write: bool) -> memoryview:
        """The payload itself if the engine can use it in place, else aligned memory for it."""
        fits = payload.nbytes % record.ALIGNMENT == 0
        if fits and (not self._io.is_direct or is_aligned(payload)):
            return payload
        staging = aligned(record.padded(payload.nbytes))
        if is_write:
            copy(staging[: payload.nbytes], payload)
        return staging

    def _run(self, jobs: Iterable[Job]) -> None:
        try:
            flow = self._idle.pop()
        except IndexError:
            queue = open_queue(self._io, DEPTH, self._threads, self.slot_bytes)
            flow = Flow(queue, self._longest_run)
        flow.run(jobs)
        self._idle.append(flow)

    def _runs(self, slots: list[int]) -> Iterator[list[int]]:
        """The places of the slots in runs of adjacent ones, none longer than RUN_BYTES."""
        run: list[int] = []
        following = -1
        for place in sorted(range(len(slots)), key=slots.__getitem__):
            if run and (slots[place] != following or len(run) == self._longest_run):
                yield run
                run = []
            run.append(place)
            following = slots[place] + 1
        if run:
            yield run


@dataclass(slots=True, eq=False)
class _WriteRun:
    """Writes of adjacent slots: `run` are their places in the batch."""

    slots: SlotIo
    run: list[int]
    batch: Sequence[SlotWrite]
    generations: Sequence[int]
    settled: int
    outcomes: list[Outcome]

    def start(self, number: int, headers: list[memoryview]) -> Operation:
        buffers: list[memoryview] = []
        for place, out in zip(self.run, headers, strict=False):
            write = self.batch[place]
            record.encode(self._header(write, self.generations[place]), out)
            buffers += (out, self.slots.staged(write.payload, is_write=True))
        size = self.slots.slot_bytes
        offset = self.batch[self.run[0]].slot * size
        return Operation(number, True, buffers, offset, len(self.run) * size)

    def end(self, moved: int | OSError) -> None:
        outcome = failure(moved) if isinstance(moved, OSError) else DONE
        for place in self.run:
            self.outcomes[place] = outcome

    def _header(self, write: SlotWrite, generation: int) -> record.Header:
        ours, payload = self.slots, record.digest(write.payload)
        identity = (ours.store_id, write.key, write.parent, write.slot, generation, self.settled)
        return record.Header(*identity, ours.payload_bytes, payload, write.tokens)


@dataclass(slots=True, eq=False)
class _ReadRun:
    """Reads of adjacent slots: `run` are their places in the batch."""

    slots: SlotIo
    run: list[int]
    batch: Sequence[SlotRead]
    expected: Sequence[StoredBlock]
    outcomes: list[Outcome]
    buffers: list[memoryview] = field(default_factory=list)

    def start(self, number: int, headers: list[memoryview]) -> Operation:
        for place, header in zip(self.run, headers, strict=False):
            payload = self.slots.staged(self.batch[place].out, is_write=False)
            self.buffers += (header, payload)
        size = self.slots.slot_bytes
        offset = self.batch[self.run[0]].slot * size
        return Operation(number, False, self.buffers, offset, len(self.run) * size)

    def end(self, moved: int | OSError) -> None:
        for index, place in enumerate(self.run):
            if isinstance(moved, OSError):
                self.outcomes[place] = failure(moved)
            elif moved < (index + 1) * self.slots.slot_bytes:
                self.outcomes[place] = Failure(Cause.SHORT_READ)
            else:
                found = self.buffers[2 * index : 2 * index + 2]
                read, block = self.batch[place], self.expected[place]
                self.outcomes[place] = self._verified(read, block, *found)

    def _verified(
        self, read: SlotRead, block: StoredBlock, header: memoryview, payload: memoryview
    ) -> Outcome:
        """Compare what was read with what is expected; fill `out` if it was not read in place."""
        found = record.decode(header, self.slots.store_id, read.slot)
        if isinstance(found, Failure):
            return Failure(Cause.CORRUPT, found.detail)
        if (found.key, found.parent, found.tokens, found.generation) != block[1:5]:
            return Failure(Cause.CORRUPT, f"generation {found.generation} of another write")
        is_staged = payload is not read.out
        if is_staged:
            payload = payload[: self.slots.payload_bytes]
        if record.digest(payload) != found.payload_digest:
            return Failure(Cause.CORRUPT, "payload checksum")
        if is_staged:
            copy(read.out, payload)
        return DONE


@dataclass(slots=True, eq=False)
class _Erasure:
    """Zeros over the header of one slot."""

    slots: SlotIo
    place: int
    slot: int
    outcomes: list[Outcome]

    def start(self, number: int, headers: list[memoryview]) -> Operation:
        offset = self.slot * self.slots.slot_bytes
        return Operation(number, True, [_ZEROS], offset, record.HEADER_BYTES)

    def end(self, moved: int | OSError) -> None:
        self.outcomes[self.place] = failure(moved) if isinstance(moved, OSError) else DONE


_ZEROS = aligned(record.HEADER_BYTES)
_NOT_ENDED = Failure(Cause.IO_ERROR, "it did not end")


def failure(error: OSError) -> Failure:
    """What an error of the file system means to a caller."""
    return Failure(Cause.NO_SPACE if error.errno in FULL else Cause.IO_ERROR, str(error))
