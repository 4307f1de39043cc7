"""Blocks for tests of stores: everything about a block follows from its number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from tierkv.storage.base import BlockStore, Cause, Failure, Outcome, SlotRead, SlotWrite
from tierkv.storage.directory import StoreSpec, open_directory
from tierkv.storage.io import IoEngine, aligned
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.nvme_store import NvmeStore

PAYLOAD_BYTES = 8192


def key_of(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


def tokens_of(number: int) -> bytes:
    return hashlib.shake_128(b"tokens %d" % number).digest(64)


def payload_of(number: int, size: int = PAYLOAD_BYTES) -> bytes:
    return hashlib.shake_128(b"payload %d" % number).digest(size)


def write_of(slot: int, number: int, size: int = PAYLOAD_BYTES) -> SlotWrite:
    """Block `number`, child of block `number - 1`, into `slot`; the payload is page-aligned."""
    payload = aligned(size)
    payload[:] = payload_of(number, size)
    return SlotWrite(slot, key_of(number), key_of(number - 1), tokens_of(number), payload)


def read_back(store: BlockStore, slot: int, number: int) -> tuple[Outcome, bytes]:
    """Ask for block `number` in `slot`; the outcome and the bytes."""
    read = SlotRead(slot, key_of(number), aligned(store.slot_payload_bytes))
    outcome = store.read([read])[0]
    return outcome, bytes(read.out)


def cause(outcome: Outcome) -> Cause | None:
    return outcome.cause if isinstance(outcome, Failure) else None


def open_nvme(
    path: Path,
    capacity: int = 16,
    size: int = PAYLOAD_BYTES,
    open_io: Callable[[Path, int], IoEngine] = PosixIo,
) -> NvmeStore:
    """A store in the directory itself."""
    return NvmeStore.start(open_directory(path, StoreSpec("tests", size, capacity), open_io))
