"""The KV of one session as a file: a chain of blocks that another server can load.

    header    0:8      magic "TIERKVSF"
              8:12     format version
              12:16    size of the fields
              16:      fields, a JSON object: model, layout (fingerprints, hex), block_size (in
                       tokens), block_bytes, salt, session_id

    block     0        "B"
              1:17     key
              17:33    key of its parent: that of the block before, or the root of the salt
              33:49    xxh3-128 of the payload
              49:      4 * block_size bytes of token ids (as in the key), block_bytes of payload

    end       0        "E"
              1:9      number of blocks
              9:41     blake2b-256 of everything before

Numbers are little-endian. Nothing may follow the end. A file is read twice: the first time to the
end, so that one that is torn or was changed is refused before a block of it is used. Checksums find
accidents; whoever can write a file can put any payload under a right key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import BinaryIO, NamedTuple, NoReturn

import xxhash

from tierkv.errors import RequestError
from tierkv.storage.base import KEY_BYTES

MAGIC = b"TIERKVSF"
VERSION = 1
TOKEN_BYTES = 4
_MOST_FIELD_BYTES = 1 << 20
_MOST_BYTES = 1 << 30  # of one block
_HEADER = Struct("<8sII")
_BLOCK = Struct(f"<{KEY_BYTES}s{KEY_BYTES}s16s")
_END = Struct("<Q")
_DIGEST_BYTES = 32


@dataclass(slots=True, frozen=True)
class SessionHeader:
    """What every block of a file has in common; only a server with the same can load them.

    Attributes:
        model, layout: fingerprints, hex.
        block_size: tokens of a block.
        block_bytes: bytes of its payload.
        salt: the cache salt under which its keys are.
        session_id: what the session was called.
    """

    model: str
    layout: str
    block_size: int
    block_bytes: int
    salt: str
    session_id: str = ""


class SessionBlock(NamedTuple):
    """One block of a file; `tokens` are packed ids."""

    key: bytes
    parent: bytes
    tokens: bytes
    payload: bytes


def most_file_bytes(block_size: int, block_bytes: int, num_tokens: int) -> int:
    """The size that no file of a session of so many tokens exceeds."""
    block = 1 + _BLOCK.size + TOKEN_BYTES * block_size + block_bytes
    return (
        _HEADER.size
        + _MOST_FIELD_BYTES
        + num_tokens // block_size * block
        + 1
        + _END.size
        + _DIGEST_BYTES
    )


class SessionWriter:
    """Makes the bytes of a file, piece by piece."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=_DIGEST_BYTES)
        self._count = 0

    def header(self, header: SessionHeader) -> bytes:
        """The first piece."""
        fields = json.dumps(dataclasses.asdict(header)).encode()
        return self._noted(_HEADER.pack(MAGIC, VERSION, len(fields)) + fields)

    def block(self, block: SessionBlock) -> bytes:
        """The next block."""
        self._count += 1
        digest = xxhash.xxh3_128_digest(block.payload)
        fields = _BLOCK.pack(block.key, block.parent, digest)
        return self._noted(b"".join((b"B", fields, block.tokens, block.payload)))

    def end(self) -> bytes:
        """The last piece; without it the file counts as torn."""
        return self._noted(b"E" + _END.pack(self._count)) + self._digest.digest()

    def _noted(self, piece: bytes) -> bytes:
        self._digest.update(piece)
        return piece


class SessionReader:
    """Reads a file from where it stands, checking as it goes.

    Raises (here, and while blocks are read):
        RequestError: it is no such file, of another version, torn, or was changed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = blake2b(digest_size=_DIGEST_BYTES)
        magic, version, size = _HEADER.unpack(self._read(_HEADER.size, "its header"))
        if magic != MAGIC:
            _refuse("is no exported session")
        if version != VERSION:
            _refuse(f"has format version {version}; this server reads {VERSION}")
        if size > _MOST_FIELD_BYTES:
            _refuse("is damaged in its header")
        self.header = _parse(self._read(size, "its header"))

    def blocks(self) -> Iterator[SessionBlock]:
        """All blocks; ends well only if the whole file is as it was written."""
        number = 0
        while self._read(1, "its blocks") == b"B":
            number += 1
            yield self._block(f"block {number}")
        at_end = self._read(_END.size, "its end")
        if self._digest.digest() != self._file.read(_DIGEST_BYTES) or self._file.read(1):
            _refuse("is torn or was changed: its digest is wrong")
        if _END.unpack(at_end) != (number,):
            _refuse("is damaged at its end")

    def _block(self, place: str) -> SessionBlock:
        key, parent, digest = _BLOCK.unpack(self._read(_BLOCK.size, place))
        tokens = self._read(TOKEN_BYTES * self.header.block_size, place)
        payload = self._read(self.header.block_bytes, place)
        if xxhash.xxh3_128_digest(payload) != digest:
            _refuse(f"is damaged in {place}")
        return SessionBlock(key, parent, tokens, payload)

    def _read(self, count: int, place: str) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            _refuse(f"is torn: it ends in {place}")
        self._digest.update(data)
        return data


def _parse(fields: bytes) -> SessionHeader:
    try:
        header = SessionHeader(**json.loads(fields))
    except (TypeError, ValueError, RecursionError):
        _refuse("is damaged in its header")
    sizes = header.block_size, header.block_bytes
    texts = header.model, header.layout, header.salt, header.session_id
    if not all(map(_is_text, texts)) or not all(map(_is_size, sizes)):
        _refuse("is damaged in its header")
    return header


def _is_text(value: object) -> bool:
    """Text that is Unicode: JSON can spell half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _MOST_BYTES


def _refuse(what: str) -> NoReturn:
    raise RequestError("file", "<session>", f"{what}; nothing of it was used")
