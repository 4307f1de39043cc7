"""The format of a slot: pinned bytes, and nothing damaged passes."""

from __future__ import annotations

import pytest

from tierkv.storage import record
from tierkv.storage.base import MAX_TOKENS_BYTES, Cause, Failure
from tierkv.storage.io import aligned

STORE_ID = bytes(range(16))
PAYLOAD = memoryview(bytes(range(256)) * 20)
HEADER = record.Header(
    store_id=STORE_ID,
    key=b"K" * 16,
    parent=b"P" * 16,
    slot=7,
    generation=0x1122334455,
    settled=0x1122334400,
    payload_bytes=len(PAYLOAD),
    payload_digest=record.digest(PAYLOAD),
    tokens=bytes(range(64)),
)


def encoded(header: record.Header = HEADER) -> memoryview:
    out = aligned(record.HEADER_BYTES)
    record.encode(header, out)
    return out


def test_golden_bytes() -> None:
    """These bytes are on people's disks: a failure here means a new format version is due."""
    data = bytes(encoded())
    assert data[:108].hex() == (
        "544945524b56424c"  # TIERKVBL
        "01000000"
        "00140000"
        "000102030405060708090a0b0c0d0e0f"
        + "4b" * 16
        + "50" * 16
        + "0700000000000000"
        + "5544332211000000"
        + "0044332211000000"
        + "87cf83cc9a055cf4f875f2fa2e99df80"
        + "40000000"
    )
    assert data[108:172] == bytes(range(64))
    assert not any(data[172:4080])
    assert data[4080:].hex() == "c9d6e5c5d502438b31250095cdc318c6"


def test_a_header_comes_back() -> None:
    assert record.decode(encoded(), STORE_ID, 7) == HEADER


def test_the_longest_token_list_fits() -> None:
    header = HEADER._replace(tokens=b"\xff" * MAX_TOKENS_BYTES)
    assert record.decode(encoded(header), STORE_ID, 7) == header


def test_a_flip_in_any_header_byte_is_seen() -> None:
    data = encoded()
    for offset in range(record.HEADER_BYTES):
        data[offset] ^= 1 << offset % 8
        assert isinstance(record.decode(data, STORE_ID, 7), Failure), offset
        data[offset] ^= 1 << offset % 8
    assert record.decode(data, STORE_ID, 7) == HEADER


@pytest.mark.parametrize(
    ("store_id", "slot", "cause"),
    [(STORE_ID, 8, Cause.CORRUPT), (bytes(16), 7, Cause.CORRUPT)],
)
def test_a_record_in_the_wrong_place_is_seen(store_id: bytes, slot: int, cause: Cause) -> None:
    found = record.decode(encoded(), store_id, slot)
    assert isinstance(found, Failure)
    assert found.cause is cause


def test_zeros_are_empty_and_other_versions_are_not_read() -> None:
    empty = record.decode(aligned(record.HEADER_BYTES), STORE_ID, 7)
    assert empty == Failure(Cause.NOT_FOUND, "empty")
    data = encoded()
    data[8] = 2
    data[4080:] = record.digest(data[:4080])
    newer = record.decode(data, STORE_ID, 7)
    assert newer == Failure(Cause.NOT_FOUND, "format version 2")


def test_sizes_are_padded() -> None:
    assert [record.padded(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert record.slot_bytes(5000) == 4096 + 8192
