"""What a lower tier is: numbered slots that each keep one block's bytes.

The cache decides which slot holds which block and who must leave; a store only keeps bytes and
says truthfully whether they are still right. Nothing here knows tokens, tensors or models.

    write   reserve -> payload and header -> sync -> remembered     DONE means durable
    read    header and payload, all verified                        DONE means these very bytes
    erase   header gone and synced                                  DONE means it never comes back

A failure is an answer (`Failure`), never an exception: the caller treats it as a miss. Exceptions
are for callers' bugs (`InvariantError`): a slot that does not exist, a payload of the wrong size,
two writes at once into one slot.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tierkv.errors import InvariantError

KEY_BYTES = 16
MAX_TOKENS_BYTES = 1024
"""256 tokens of 4 bytes."""


class Cause(enum.Enum):
    """Why a slot could not be read, written or erased."""

    NOT_FOUND = "not_found"  # the slot does not hold this key
    CORRUPT = "corrupt"  # what is there is not what was written
    SHORT_READ = "short_read"  # the file ends too early
    IO_ERROR = "io_error"  # the device or the file system refused
    NO_SPACE = "no_space"  # the file system is full
    LATE = "late"  # the answer came after its time
    CLOSED = "closed"  # the store is closed
    QUARANTINED = "quarantined"  # the tier failed too often and is left alone for a while


@dataclass(frozen=True, slots=True)
class Done:
    """It was done, completely."""


@dataclass(frozen=True, slots=True)
class Failure:
    """It was not done; `detail` is for the log."""

    cause: Cause
    detail: str = ""


Outcome = Done | Failure
DONE = Done()


@dataclass(frozen=True, slots=True)
class SlotWrite:
    """One block to keep.

    Attributes:
        slot: where; whatever was there is gone, even if the write fails.
        key, parent: the block's key and its parent's, 16 bytes each.
        tokens: token ids as the caller packs them; opaque, at most `MAX_TOKENS_BYTES`.
        payload: exactly the store's `slot_payload_bytes`; not changed by anybody before `write`
            returns. When it starts at a multiple of 4 KiB and its size is one, it is not copied.
    """

    slot: int
    key: bytes
    parent: bytes
    tokens: bytes
    payload: memoryview


@dataclass(frozen=True, slots=True)
class SlotRead:
    """One block to fetch into `out` (`slot_payload_bytes`, writable; undefined unless DONE)."""

    slot: int
    key: bytes
    out: memoryview


class StoredBlock(NamedTuple):
    """What a store knows about the block in a slot."""

    slot: int
    key: bytes
    parent: bytes
    tokens: bytes
    generation: int
    hits: int
    last_use: float


@dataclass(slots=True)
class StoreStats:
    """Counters since the store was opened.

    Attributes:
        reads, writes, erases: slots asked for.
        read_bytes, written_bytes: payload bytes of those that were DONE.
        failures: answers that were not DONE, by cause.
    """

    reads: int = 0
    writes: int = 0
    erases: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    failures: Counter[Cause] = field(default_factory=Counter)


class BlockStore(Protocol):
    """Slots for blocks. Every method may be called from any thread and blocks until it is done.

    I/O, checksums and copies of payloads release the interpreter lock. Answers come in the order
    of the batch, one each. The cache orders accesses to one slot; a store that sees a read race
    with a write answers with the old bytes, the new bytes or a `Failure`, never with a mixture.
    """

    @property
    def slot_payload_bytes(self) -> int: ...

    @property
    def capacity(self) -> int:
        """Number of slots, numbered from 0."""
        ...

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        """Keep blocks; adjacent slots become one operation, the batch shares one sync.

        Each DONE block survives kill -9 and power loss (if the store is persistent at all).
        A slot that failed holds nothing that a read would return.

        Raises:
            InvariantError: wrong sizes, an unknown slot, or a slot that is being written.
        """
        ...

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        """Fetch blocks into the buffers given.

        Raises:
            InvariantError: wrong sizes or an unknown slot.
        """
        ...

    def erase(self, slots: Sequence[int]) -> list[Outcome]:
        """Make slots empty for good, and with each any older copy of the same key elsewhere.

        Overwriting does not need it. After DONE no restart, however the process ends, brings
        the block back.

        Raises:
            InvariantError: an unknown slot, or one that is being written.
        """
        ...

    def recover(self) -> list[StoredBlock]:
        """What is held now, by slot: after opening, what survived. Of equal keys the newest."""
        ...

    def touch(self, slots: Sequence[int]) -> None:
        """Note that blocks were used (`hits`, `last_use`); costs no I/O, may be lost in a crash."""
        ...

    def flush(self) -> None:
        """Write out what `touch` noted; blocks themselves are durable without it."""
        ...

    def stats(self) -> StoreStats: ...

    def close(self) -> None:
        """Wait for calls in progress, then let go; later calls answer CLOSED. Idempotent."""
        ...


def check_writes(store: BlockStore, batch: Sequence[SlotWrite]) -> None:
    """Raise InvariantError unless every write fits the store and no slot comes twice."""
    check_slots(store, [write.slot for write in batch])
    for write in batch:
        _check_buffer(store, write.slot, write.key, write.payload)
        if len(write.parent) != KEY_BYTES or len(write.tokens) > MAX_TOKENS_BYTES:
            sizes = f"a parent key of {len(write.parent)} and {len(write.tokens)} token bytes"
            raise InvariantError(f"slot {write.slot}: {sizes}")


def check_reads(store: BlockStore, batch: Sequence[SlotRead]) -> None:
    """Raise InvariantError unless every read fits the store and no slot comes twice."""
    check_slots(store, [read.slot for read in batch])
    for read in batch:
        _check_buffer(store, read.slot, read.key, read.out)
        if read.out.readonly:
            raise InvariantError(f"slot {read.slot}: out cannot be written")


def check_slots(store: BlockStore, slots: Sequence[int]) -> None:
    """Raise InvariantError for a slot that does not exist or comes twice."""
    if len(set(slots)) != len(slots):
        raise InvariantError(f"a slot comes twice in one batch: {sorted(slots)[:20]}")
    for slot in slots:
        if not 0 <= slot < store.capacity:
            raise InvariantError(f"slot {slot} of {store.capacity}")


def _check_buffer(store: BlockStore, slot: int, key: bytes, buffer: memoryview) -> None:
    if (buffer.nbytes, len(key)) != (store.slot_payload_bytes, KEY_BYTES):
        sizes = f"{buffer.nbytes} bytes under a key of {len(key)}"
        raise InvariantError(f"slot {slot}: {sizes}, not {store.slot_payload_bytes} under 16")
