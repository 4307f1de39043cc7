"""What a store holds when it is opened.

    closed cleanly      the index is sealed and complete: read it
    anything else       read every header; then, of the generations above the highest `settled`
                        (the writes that were in flight, or could have been), verify the payloads
                        too and erase what is not whole; then sync, and write the index anew

So everything that was acknowledged is found again, and nothing half-written is offered, at the
price of one 4 KiB read per slot. Payloads that were settled are verified when they are first read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from tierkv.storage import record
from tierkv.storage.base import StoredBlock
from tierkv.storage.index import Index
from tierkv.storage.io import IoEngine, aligned
from tierkv.storage.manifest import Manifest

logger = logging.getLogger(__name__)

_SCAN_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Recovered:
    """The blocks of a store just opened, the highest generation used, and where from."""

    blocks: list[StoredBlock]
    generation: int
    source: str


def recover(io: IoEngine, index: Index, manifest: Manifest, pool: Executor) -> Recovered:
    """Find what is held; for a store that was not closed cleanly also make it so."""
    if manifest.session == 0:
        return Recovered([], 0, "nowhere (a new store)")
    sealed = index.sealed(manifest.session)
    if sealed is not None:
        blocks = [block for block in sealed.blocks if block.slot < manifest.capacity]
        index.delete_from(manifest.capacity)
        return Recovered(blocks, sealed.generation, "index")
    headers = list(scan(io, manifest, pool))
    settled = max((header.settled for header in headers), default=0)
    torn = {
        header.slot
        for header in headers
        if header.generation > settled and not has_payload(io, header)
    }
    erase_headers(io, sorted(torn), record.slot_bytes(manifest.payload_bytes))
    io.sync()
    usage = _Usage(index.rows())
    blocks = [usage.stored(header) for header in headers if header.slot not in torn]
    index.replace(blocks)
    generation = max((header.generation for header in headers), default=0)
    return Recovered(blocks, generation, f"headers ({len(torn)} unfinished writes erased)")


def scan(io: IoEngine, manifest: Manifest, pool: Executor) -> Iterator[record.Header]:
    """Every valid header, by slot."""
    starts = range(0, manifest.capacity, _SCAN_SLOTS)
    for headers in pool.map(partial(_scan_part, io, manifest), starts):
        yield from headers


def has_payload(io: IoEngine, header: record.Header) -> bool:
    """Whether the payload on the device is the one the header speaks of."""
    size = record.padded(header.payload_bytes)
    buffer = aligned(size)
    offset = header.slot * (record.HEADER_BYTES + size) + record.HEADER_BYTES
    try:
        count = io.preadv([buffer], offset)
    except OSError as error:
        logger.warning("slot %d: %s", header.slot, error)
        return False
    payload = buffer[: header.payload_bytes]
    return count == size and record.digest(payload) == header.payload_digest


def erase_headers(io: IoEngine, slots: list[int], slot_bytes: int) -> None:
    """Overwrite headers with zeros; not synced. Raises OSError."""
    zeros = aligned(record.HEADER_BYTES)
    for slot in slots:
        io.pwritev([zeros], slot * slot_bytes)


def _scan_part(io: IoEngine, manifest: Manifest, start: int) -> list[record.Header]:
    buffer = aligned(record.HEADER_BYTES)
    stride = record.slot_bytes(manifest.payload_bytes)
    store_id = bytes.fromhex(manifest.store_id)
    found: list[record.Header] = []
    num_failed = 0
    for slot in range(start, min(start + _SCAN_SLOTS, manifest.capacity)):
        try:
            count = io.preadv([buffer], slot * stride)
        except OSError:
            count = 0
        header = record.decode(buffer, store_id, slot) if count == len(buffer) else None
        num_failed += header is None
        if isinstance(header, record.Header) and header.payload_bytes == manifest.payload_bytes:
            found.append(header)
    if num_failed:
        logger.warning("%d headers from slot %d on could not be read", num_failed, start)
    return found


class _Usage:
    """The statistics in rows of an index that is not trusted."""

    def __init__(self, rows: list[StoredBlock]) -> None:
        self._found = {(row.slot, row.key, row.generation): row for row in rows}
        self._latest = max((row.last_use for row in rows), default=0.0)

    def stored(self, header: record.Header) -> StoredBlock:
        """The header's block, with its statistics; one without a row was written after the last
        that has one."""
        row = self._found.get((header.slot, header.key, header.generation))
        hits, last_use = (row.hits, row.last_use) if row is not None else (0, self._latest)
        return StoredBlock(
            header.slot, header.key, header.parent, header.tokens, header.generation, hits, last_use
        )
