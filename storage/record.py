"""The format of one slot on disk: a header of 4 KiB, then the payload padded to 4 KiB.

    bytes       header field (integers are little-endian)
    ------------+-------------------------------------------------------------------
    0:8         magic "TIERKVBL"
    8:12        format version
    12:16       number of payload bytes
    16:32       id of the store (MANIFEST): bytes of another file are not ours
    32:48       block key
    48:64       key of the parent block
    64:72       slot: a header that landed in the wrong place is not valid there
    72:80       generation: counts writes of the whole store, never repeats
    80:88       settled: every write up to this generation had succeeded or failed
    88:104      xxh3-128 of the payload (padding not included)
    104:108     number of token bytes
    108:4080    token bytes (opaque here, at most 1024), then zeros
    4080:4096   xxh3-128 of header bytes 0:4080
    ------------+-------------------------------------------------------------------
    4096:       payload, then zeros up to a multiple of 4 KiB

The header's checksum covers the payload's, so the two together cover every byte of the record and
bind the payload to key, slot, generation and store: an old payload under a new header, a new
payload under an old header, a record in the wrong slot and half a write all fail. The header alone
can be verified without its payload, which lets a store of terabytes open in seconds.

Order of writes: payload and header together, sync, then the index row. So a header may be durable
while its payload is not. `settled` confines that to the end: payloads of generations above the
highest `settled` of all headers are verified when a crash is recovered, the rest at first read.

An erased slot has a header of zeros. Numbers, order and sizes above are the format: never edit
them, add a version. To phase one out, stop writing it (`VERSION`), and drop the code that reads it
(`OLDEST_READABLE`) a release later; a store in an unknown version is left alone, and the engine
starts cold beside it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from tierkv.storage.base import Cause, Failure

ALIGNMENT = 4096
HEADER_BYTES = 4096
VERSION = 1
OLDEST_READABLE = 1
MAGIC = b"TIERKVBL"

_FIELDS = struct.Struct("<8sII16s16s16sQQQ16sI")
_DIGEST_AT = HEADER_BYTES - 16


class Header(NamedTuple):
    """One record's header, decoded."""

    store_id: bytes
    key: bytes
    parent: bytes
    slot: int
    generation: int
    settled: int
    payload_bytes: int
    payload_digest: bytes
    tokens: bytes


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def slot_bytes(payload_bytes: int) -> int:
    """Bytes of a slot on disk."""
    return HEADER_BYTES + padded(payload_bytes)


def digest(data: memoryview) -> bytes:
    """xxh3-128; releases the interpreter lock."""
    return xxhash.xxh3_128_digest(data)


def encode(header: Header, out: memoryview) -> None:
    """Write the header into `out`, 4 KiB; sizes were checked (`base.check_writes`)."""
    rest = (*header[:6], header.payload_digest, len(header.tokens))
    fields = _FIELDS.pack(MAGIC, VERSION, header.payload_bytes, *rest)
    body = (fields + header.tokens).ljust(_DIGEST_AT, b"\0")
    out[:] = body + xxhash.xxh3_128_digest(body)


def decode(data: memoryview, store_id: bytes, slot: int) -> Header | Failure:
    """The header in `data` if it is whole and belongs to this slot of this store."""
    magic, version, payload_bytes, owner, key, parent, at, generation, settled, checksum, size = (
        _FIELDS.unpack_from(data)
    )
    if magic != MAGIC:
        empty = not any(data[: _FIELDS.size])
        return Failure(Cause.NOT_FOUND, "empty") if empty else Failure(Cause.CORRUPT, "no magic")
    if digest(data[:_DIGEST_AT]) != data[_DIGEST_AT:HEADER_BYTES]:
        return Failure(Cause.CORRUPT, "header checksum")
    if not OLDEST_READABLE <= version <= VERSION:
        return Failure(Cause.NOT_FOUND, f"format version {version}")
    if owner != store_id or at != slot:
        return Failure(Cause.CORRUPT, f"record of slot {at} in store {owner.hex()}")
    tokens = bytes(data[_FIELDS.size : _FIELDS.size + size])
    return Header(owner, key, parent, at, generation, settled, payload_bytes, checksum, tokens)
