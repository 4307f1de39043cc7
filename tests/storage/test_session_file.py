"""The file of a session: what is written is read, and anything else is refused whole."""

from __future__ import annotations

import io

import pytest

from tierkv.errors import RequestError
from tierkv.storage.session_file import (
    SessionBlock,
    SessionHeader,
    SessionReader,
    SessionWriter,
    most_file_bytes,
)

HEADER = SessionHeader("aa" * 16, "bb" * 16, block_size=2, block_bytes=5, salt="tenant:x ü")


def block(number: int) -> SessionBlock:
    key, parent = bytes([number + 1]) * 16, bytes([number]) * 16
    return SessionBlock(key, parent, bytes(range(8)), bytes([65 + number]) * 5)


BLOCKS = [block(i) for i in range(3)]


def written(blocks: list[SessionBlock] = BLOCKS, header: SessionHeader = HEADER) -> bytes:
    writer = SessionWriter()
    pieces = [writer.header(header), *(writer.block(each) for each in blocks), writer.end()]
    return b"".join(pieces)


def read(data: bytes) -> tuple[SessionHeader, list[SessionBlock]]:
    reader = SessionReader(io.BytesIO(data))
    return reader.header, list(reader.blocks())


def test_what_is_written_is_read() -> None:
    assert read(written()) == (HEADER, BLOCKS)
    assert read(written([])) == (HEADER, [])


def test_no_file_is_larger_than_its_tokens_say() -> None:
    size, num_bytes = HEADER.block_size, HEADER.block_bytes
    assert len(written()) <= most_file_bytes(size, num_bytes, 6)
    no_block = most_file_bytes(size, num_bytes, 1)
    assert most_file_bytes(size, num_bytes, 7) - no_block == 3 * (49 + 8 + 5)


def test_it_begins_where_the_file_stands() -> None:
    file = io.BytesIO(b"before" + written())
    file.seek(6)
    assert list(SessionReader(file).blocks()) == BLOCKS


def test_the_format_stays() -> None:
    data = written(BLOCKS[:1])
    assert data[:8] == b"TIERKVSF"
    assert data[8:12] == b"\x01\0\0\0"
    size = int.from_bytes(data[12:16], "little")
    at = 16 + size
    assert data[at : at + 1] == b"B"
    assert data[at + 1 : at + 17] == b"\x01" * 16
    assert data[at + 17 : at + 33] == b"\0" * 16
    assert data[at + 33 : at + 49].hex() == "5379a0de9e0e675e737f64bddf672573"
    assert data[at + 49 : at + 57] == bytes(range(8))
    assert data[at + 57 : at + 62] == b"AAAAA"
    assert data[at + 62 : at + 71] == b"E\x01\0\0\0\0\0\0\0"
    assert len(data) == at + 71 + 32


@pytest.mark.parametrize("bit", [0, 7])
def test_any_flipped_bit_is_found(bit: int) -> None:
    whole = written()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << bit
        with pytest.raises(RequestError, match="file="):
            read(bytes(data))


def test_any_torn_file_is_found() -> None:
    whole = written()
    for size in range(len(whole)):
        with pytest.raises(RequestError, match=r"torn|no exported"):
            read(whole[:size])


def test_nothing_may_follow() -> None:
    with pytest.raises(RequestError, match="digest"):
        read(written() + b"\0")
    with pytest.raises(RequestError, match="digest"):
        read(written() + written())


@pytest.mark.parametrize("blocks", [BLOCKS[:2], BLOCKS[::-1]])
def test_blocks_taken_out_or_put_elsewhere_are_found(blocks: list[SessionBlock]) -> None:
    whole, other = written(), written(blocks)
    with pytest.raises(RequestError, match="digest"):
        read(other[:-41] + whole[-41:])


def test_another_version_is_named() -> None:
    data = bytearray(written())
    data[8] = 9
    with pytest.raises(RequestError, match="version 9"):
        read(bytes(data))


def test_other_files_are_no_session() -> None:
    with pytest.raises(RequestError, match="no exported session"):
        read(b"PK\x03\x04" + bytes(100))


@pytest.mark.parametrize(
    "fields",
    [b"[]", b"{}", b'{"model": 1}', b"\xff", b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000,
     b'{"model": "", "layout": "", "block_size": 1, "block_bytes": 1, "salt": "\\ud800"}',
     b'{"model": "", "layout": "", "block_size": true, "block_bytes": 1, "salt": ""}',
     b'{"model": "", "layout": "", "block_size": 0, '
     b'"block_bytes": 1, "salt": ""}', b'{"model": "", "layout": "", "block_size": 1, '
     b'"block_bytes": 1099511627776, "salt": ""}'],
)  # fmt: skip
def test_a_header_that_makes_no_sense_costs_nothing(fields: bytes) -> None:
    data = b"TIERKVSF\x01\0\0\0" + len(fields).to_bytes(4, "little") + fields + bytes(100)
    with pytest.raises(RequestError, match="header"):
        read(data)
