"""Opening after a crash: what was in flight is told from what was settled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from store_blocks import PAYLOAD_BYTES, key_of, open_nvme, payload_of, tokens_of, write_of

from tierkv.errors import InvariantError
from tierkv.storage import record
from tierkv.storage.base import DONE, StoredBlock
from tierkv.storage.directory import StoreSpec, open_directory
from tierkv.storage.io import aligned
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.manifest import Manifest, read_manifest
from tierkv.storage.nvme_store import NvmeStore
from tierkv.storage.table import SlotTable

SLOT_BYTES = record.slot_bytes(PAYLOAD_BYTES)


def crashed(store: NvmeStore, target: Path) -> Path:
    """The directory as kill -9 would leave it now."""
    shutil.copytree(store.path, target)
    store.close()
    return target


def put_torn_record(path: Path, slot: int, number: int, generation: int, settled: int) -> None:
    """A header that became durable without its payload."""
    manifest = read_manifest(path)
    assert isinstance(manifest, Manifest)
    header = record.Header(
        bytes.fromhex(manifest.store_id),
        key_of(number),
        key_of(number - 1),
        slot,
        generation,
        settled,
        PAYLOAD_BYTES,
        record.digest(memoryview(payload_of(number))),
        tokens_of(number),
    )
    out = aligned(record.HEADER_BYTES)
    record.encode(header, out)
    with (path / "blocks.data").open("r+b") as file:
        file.seek(slot * SLOT_BYTES)
        file.write(out)


def offered(store: NvmeStore) -> dict[int, bytes]:
    return {block.slot: block.key for block in store.recover()}


def test_an_unfinished_write_does_not_hide_an_older_copy(tmp_path: Path) -> None:
    store = open_nvme(tmp_path / "a")
    assert store.write([write_of(1, 7), write_of(2, 8)]) == [DONE] * 2
    path = crashed(store, tmp_path / "b")
    put_torn_record(path, slot=4, number=7, generation=3, settled=2)
    store = open_nvme(path)
    assert offered(store) == {1: key_of(7), 2: key_of(8)}
    # The next write settles generation 3: by then its header must be gone.
    assert store.write([write_of(3, 9)]) == [DONE]
    assert store.write([write_of(5, 10)]) == [DONE]
    again = open_nvme(crashed(store, tmp_path / "c"))
    assert offered(again) == {1: key_of(7), 2: key_of(8), 3: key_of(9), 5: key_of(10)}
    again.close()


def test_settled_payloads_are_not_read_at_opening(tmp_path: Path) -> None:
    store = open_nvme(tmp_path / "a")
    for slot in range(6):
        assert store.write([write_of(slot, slot)]) == [DONE]
    path = crashed(store, tmp_path / "b")
    with (path / "blocks.data").open("r+b") as file:
        for slot in range(6):
            file.seek(slot * SLOT_BYTES + 5000)
            file.write(b"XX")
    store = open_nvme(path)
    assert offered(store) == {slot: key_of(slot) for slot in range(5)}  # 5 was not settled
    store.close()


def test_the_order_of_uses_survives_a_crash(tmp_path: Path) -> None:
    """As far as the index knew; what was written after that was used last."""
    seconds = [100.0]

    def now() -> float:
        return seconds[0]

    def at(path: Path) -> NvmeStore:
        return NvmeStore.start(
            open_directory(path, StoreSpec("tests", PAYLOAD_BYTES, 16), PosixIo), now
        )

    store = at(tmp_path / "a")
    store.write([write_of(slot, slot) for slot in range(3)])
    seconds[0] = 200.0
    store.touch([1])
    store.flush()
    seconds[0] = 300.0
    store.touch([2])
    store.write([write_of(3, 3)])
    store = at(crashed(store, tmp_path / "b"))
    found = {block.slot: (block.hits, block.last_use) for block in store.recover()}
    assert found == {0: (0, 100.0), 1: (1, 200.0), 2: (0, 100.0), 3: (0, 200.0)}
    store.close()


def test_generations_are_settled_when_no_earlier_write_is_in_flight() -> None:
    table = SlotTable(generation=10)
    assert table.begin({0: b"a", 1: b"b"}) == ([11, 12], 10)
    assert table.begin({2: b"c"}) == ([13], 10)
    table.finish([2], {})
    assert table.begin({2: b"c"}) == ([14], 10)
    table.finish([0, 1], {})
    assert table.begin({5: b"d"}) == ([15], 13)


def test_a_slot_in_flight_is_taken_by_nobody_else() -> None:
    table = SlotTable([StoredBlock(0, b"a", b"", b"", 1, 0, 0.0)], generation=1)
    table.begin({1: b"b"})
    with pytest.raises(InvariantError, match=r"slots \[1\] are being written"):
        table.begin({0: b"x", 1: b"y"})
    with pytest.raises(InvariantError, match=r"slots \[1\] are being written"):
        table.begin_erase([0, 1])
    assert table.get(0) is not None
    assert table.generation == 2
