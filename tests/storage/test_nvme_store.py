"""The store on a healthy disk and on damaged files: what is kept, what is noticed."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from store_blocks import (
    PAYLOAD_BYTES,
    cause,
    key_of,
    open_nvme,
    payload_of,
    read_back,
    tokens_of,
    write_of,
)

from tierkv.errors import ConfigError
from tierkv.storage import nvme_store
from tierkv.storage.base import DONE, Cause, SlotRead, SlotWrite
from tierkv.storage.faults import Fault, FaultPlan, FaultyIo
from tierkv.storage.index import remove_index
from tierkv.storage.io import IoEngine, aligned
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.nvme_store import NvmeStore
from tierkv.storage.record import HEADER_BYTES, slot_bytes

SLOT_BYTES = slot_bytes(PAYLOAD_BYTES)


def fill(path: Path, numbers: range = range(8)) -> None:
    """A closed store with block n in slot n."""
    store = open_nvme(path)
    assert store.write([write_of(n, n) for n in numbers]) == [DONE] * len(numbers)
    store.close()


def right(store: NvmeStore, numbers: range = range(8)) -> list[int]:
    """The slots whose block is read, and is right."""
    found = []
    for n in numbers:
        outcome, payload = read_back(store, n, n)
        if outcome == DONE:
            assert payload == payload_of(n)
            found.append(n)
    return found


def reopened(path: Path, caplog: pytest.LogCaptureFixture) -> tuple[NvmeStore, str]:
    with caplog.at_level(logging.INFO):
        caplog.clear()
        store = open_nvme(path)
    return store, caplog.messages[-1].rpartition("from ")[2]


def test_a_restart_comes_back_warm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    store, source = reopened(tmp_path, caplog)
    assert source == "index"
    assert right(store) == list(range(8))
    assert [b.tokens for b in store.recover()] == [tokens_of(n) for n in range(8)]
    generation = max(block.generation for block in store.recover())
    store.write([write_of(9, 9)])
    assert store.recover()[-1].generation > generation
    store.close()


def test_statistics_survive(tmp_path: Path) -> None:
    fill(tmp_path)
    store = open_nvme(tmp_path)
    store.touch([3, 3, 4])
    store.close()
    again = open_nvme(tmp_path)
    assert [block.hits for block in again.recover()] == [0, 0, 0, 2, 1, 0, 0, 0]
    again.close()


def test_touching_costs_no_io(tmp_path: Path) -> None:
    """It is called in every step of the engine."""
    calls: list[tuple[str, int]] = []
    store = open_nvme(tmp_path, open_io=lambda path, size: CountingIo(PosixIo(path, size), calls))
    store.write([write_of(n, n) for n in range(8)])
    store.flush()
    calls.clear()
    before = [(file.name, file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())]
    for _ in range(100):
        store.touch(range(8))
    assert calls == []
    after = [(file.name, file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())]
    assert after == before
    store.close()


def test_the_index_follows_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme_store, "MOST_NOTED", 6)
    store = open_nvme(tmp_path)
    store.write([write_of(n, n) for n in range(4)])
    store.touch([1])
    assert (store._index.num_noted, store._index.rows()) == (4, [])
    store.erase([0])
    store.write([write_of(n, n) for n in range(4, 8)])
    deadline_s = time.monotonic() + 20
    while not (rows := store._index.rows()):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert store._written_out is not None
    store._written_out.result()
    rows = store._index.rows()
    assert [(row.slot, row.hits) for row in rows] == [(n, int(n == 1)) for n in range(1, 8)]
    assert store._index.num_noted == 0
    store.close()


def test_statistics_that_come_late_do_not_touch_the_next_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    store = open_nvme(tmp_path)
    store.touch([3])
    noted = store._table.take_touched()
    store.write([write_of(3, 33)])
    store._index.put_usage(noted)
    store.close()
    again, source = reopened(tmp_path, caplog)
    assert source == "index"
    assert read_back(again, 3, 33)[0] == DONE
    again.close()


INDEX_DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": lambda index: index.unlink(),
    "empty": lambda index: index.write_bytes(b""),
    "no database": lambda index: index.write_bytes(b"garbage" * 2000),
    "cut": lambda index: os.truncate(index, index.stat().st_size // 2),
    "zeros inside": lambda index: overwrite(index, 4096, bytes(4096)),
    "other tokens": lambda index: index.write_bytes(
        index.read_bytes().replace(tokens_of(5), tokens_of(6))
    ),
    "other key": lambda index: index.write_bytes(index.read_bytes().replace(key_of(5), key_of(9))),
    "no schema": lambda index: index.write_bytes(
        index.read_bytes().replace(b"TABLE b", b"T\xa0BLE b")
    ),
    "no text": lambda index: query(index, "UPDATE blocks SET key = CAST(x'a0' AS TEXT)"),
    "other columns": lambda index: query(index, "ALTER TABLE seal RENAME generation TO g"),
    "older seal": lambda index: query(index, "UPDATE seal SET generation = 1"),
    "no seal": lambda index: query(index, "UPDATE seal SET generation = NULL"),
}


def query(index: Path, statement: str) -> None:
    with sqlite3.connect(index) as database:
        database.execute(statement)
    database.close()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_losing_the_index_loses_nothing(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    INDEX_DAMAGE[damage](tmp_path / "index.sqlite")
    store, source = reopened(tmp_path, caplog)
    assert source.startswith("headers")
    assert right(store) == list(range(8))
    assert [b.tokens for b in store.recover()] == [tokens_of(n) for n in range(8)]
    store.close()
    store, source = reopened(tmp_path, caplog)
    assert source == "index"
    store.close()


def test_an_older_index_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    old = (tmp_path / "index.sqlite").read_bytes()
    store = open_nvme(tmp_path)
    store.erase([1])
    store.write([write_of(2, 20)])
    store.close()
    (tmp_path / "index.sqlite").write_bytes(old)
    store, source = reopened(tmp_path, caplog)
    assert source.startswith("headers")
    assert right(store) == [0, 3, 4, 5, 6, 7]
    assert read_back(store, 2, 20)[0] == DONE
    store.close()


def test_an_index_that_breaks_in_use_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_nvme(tmp_path)
    store.write([write_of(0, 0)])
    store._index._database.execute("DROP TABLE blocks")  # type: ignore[union-attr]
    assert store.write([write_of(n, n) for n in range(8)]) == [DONE] * 8
    store.flush()
    assert "index given up" in caplog.text
    assert right(store) == list(range(8))
    store.close()
    store, source = reopened(tmp_path, caplog)
    assert source.startswith("headers")
    assert right(store) == list(range(8))
    store.close()


def test_every_flipped_byte_is_a_miss(tmp_path: Path) -> None:
    """Each header byte, and random payload bytes; padding is not read by anybody."""
    fill(tmp_path)
    store = open_nvme(tmp_path)
    chance = random.Random(1)
    data = os.open(tmp_path / "blocks.data", os.O_RDWR)
    offsets = [*range(HEADER_BYTES), *(chance.randrange(SLOT_BYTES) for _ in range(300))]
    for offset in offsets:
        at = 3 * SLOT_BYTES + offset
        byte = os.pread(data, 1, at)
        os.pwrite(data, bytes([byte[0] ^ 1 << chance.randrange(8)]), at)
        # The store stops offering a block that was found corrupt, so each flip asks anew.
        read = SlotRead(3, key_of(3), aligned(PAYLOAD_BYTES))
        (outcome,) = store._slots.read([read], [block_in(store, 3)])
        assert cause(outcome) is Cause.CORRUPT, offset
        os.pwrite(data, byte, at)
    os.close(data)
    assert right(store) == list(range(8))
    store.close()


def block_in(store: NvmeStore, slot: int):  # type: ignore[no-untyped-def]
    return store._table.get(slot)


def test_a_corrupt_block_is_not_offered_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    store = open_nvme(tmp_path)
    overwrite(tmp_path / "blocks.data", 3 * SLOT_BYTES + 5000, b"X")
    assert cause(read_back(store, 3, 3)[0]) is Cause.CORRUPT
    assert cause(read_back(store, 3, 3)[0]) is Cause.NOT_FOUND
    assert 3 not in {block.slot for block in store.recover()}
    assert store.stats().failures[Cause.CORRUPT] == 1
    assert caplog.text.count("corrupt in reads (payload checksum)") == 1
    assert store.write([write_of(3, 3)]) == [DONE]
    assert right(store) == list(range(8))
    store.close()


def test_slots_swapped_on_disk_are_misses(tmp_path: Path) -> None:
    fill(tmp_path)
    image = (tmp_path / "blocks.data").read_bytes()
    first, second = image[:SLOT_BYTES], image[SLOT_BYTES : 2 * SLOT_BYTES]
    overwrite(tmp_path / "blocks.data", 0, second + first)
    store = open_nvme(tmp_path)
    assert right(store) == list(range(2, 8))
    store.close()


def test_an_old_record_put_back_is_a_miss(tmp_path: Path) -> None:
    fill(tmp_path)
    old = (tmp_path / "blocks.data").read_bytes()[:SLOT_BYTES]
    store = open_nvme(tmp_path)
    store.write([write_of(0, 0)])
    overwrite(tmp_path / "blocks.data", 0, old)
    assert cause(read_back(store, 0, 0)[0]) is Cause.CORRUPT
    store.close()


def test_a_file_cut_underneath_is_a_short_read(tmp_path: Path) -> None:
    fill(tmp_path)
    store = open_nvme(tmp_path)
    os.truncate(tmp_path / "blocks.data", 5 * SLOT_BYTES + 100)
    reads = [SlotRead(n, key_of(n), aligned(PAYLOAD_BYTES)) for n in range(8)]
    outcomes = [cause(outcome) for outcome in store.read(reads)]
    assert outcomes == [None] * 5 + [Cause.SHORT_READ] * 3
    assert store.write([write_of(6, 6)]) == [DONE]
    assert right(store) == [0, 1, 2, 3, 4, 6]
    store.close()
    again = open_nvme(tmp_path)
    assert right(again) == [0, 1, 2, 3, 4, 6]
    again.close()


def test_files_deleted_underneath(tmp_path: Path) -> None:
    fill(tmp_path)
    store = open_nvme(tmp_path)
    (tmp_path / "blocks.data").unlink()
    assert right(store) == list(range(8))
    assert cause(store.write([write_of(1, 10)])[0]) is Cause.IO_ERROR
    store.close()
    again = open_nvme(tmp_path)
    assert right(again) == []
    again.close()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff" * 40, None])
def test_without_a_manifest_it_starts_empty(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    manifest = tmp_path / "MANIFEST"
    manifest.unlink() if damage is None else manifest.write_bytes(damage)
    store, _ = reopened(tmp_path, caplog)
    assert "starts empty, because it" in caplog.text
    assert right(store) == []
    assert store.write([write_of(0, 0)]) == [DONE]
    store.close()


def test_a_flip_in_the_manifest_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    manifest = tmp_path / "MANIFEST"
    manifest.write_text(manifest.read_text().replace('"capacity": 16', '"capacity": 17'))
    store, _ = reopened(tmp_path, caplog)
    assert "its MANIFEST is damaged" in caplog.text
    store.close()


def test_it_grows_and_shrinks(tmp_path: Path) -> None:
    fill(tmp_path)
    for capacity, expected in ((40, 8), (5, 5), (16, 5)):
        store = open_nvme(tmp_path, capacity)
        assert right(store, range(min(8, capacity))) == list(range(expected))
        assert len(store.recover()) == expected
        store.close()


def test_the_directory_is_private(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir(mode=0o755)
    fill(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o077 for file in path.iterdir()} == {0}


def test_a_second_owner_is_told_who_has_it(tmp_path: Path) -> None:
    store = open_nvme(tmp_path)
    message = in_another_process(tmp_path)
    assert f"ConfigError: nvme_path='{tmp_path}': process {os.getpid()} is using it" in message
    with pytest.raises(ConfigError, match=f"process {os.getpid()} is using it"):
        open_nvme(tmp_path)
    store.close()
    open_nvme(tmp_path).close()


def in_another_process(path: Path, before: str = "") -> str:
    """What a Python process that opens the store has to say."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom store_blocks import open_nvme\n"
        f"{before}\nopen_nvme(Path(sys.argv[2]))"
    )
    support = str(Path(__file__).parent.parent / "support")
    command = [sys.executable, "-P", "-c", program, support, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes somebody else")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    message = in_another_process(tmp_path / "store", "import os; os.setuid(65534)")
    assert "ConfigError: nvme_path=" in message
    assert "Permission denied" in message


def faulty(path: Path, plan: FaultPlan) -> NvmeStore:
    def open_io(file: Path, num_bytes: int) -> IoEngine:
        return FaultyIo(PosixIo(file, num_bytes), plan)

    return open_nvme(path, open_io=open_io)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(Fault.ERROR, Cause.IO_ERROR), (Fault.SHORT_READ, Cause.SHORT_READ)],
)
def test_a_failed_read_is_typed_and_passes(tmp_path: Path, fault: Fault, expected: Cause) -> None:
    fill(tmp_path)
    store = faulty(tmp_path, FaultPlan({0: fault}))
    assert cause(read_back(store, 0, 0)[0]) is expected
    assert right(store) == list(range(8))
    store.close()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ({0: Fault.ERROR}, Cause.IO_ERROR),
        ({0: Fault.NO_SPACE}, Cause.NO_SPACE),
        ({1: Fault.ERROR}, Cause.IO_ERROR),  # the sync
    ],
)
def test_a_failed_write_holds_nothing(
    tmp_path: Path, script: dict[int, Fault], expected: Cause, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    store = faulty(tmp_path, FaultPlan(script))
    outcomes = store.write([write_of(n, 100 + n) for n in range(3)])
    assert [cause(outcome) for outcome in outcomes] == [expected] * 3
    assert right(store) == list(range(3, 8))
    assert cause(read_back(store, 0, 100)[0]) is Cause.NOT_FOUND
    store.close()
    _, source = reopened(tmp_path, caplog)
    assert source.startswith("headers")


def test_a_block_erased_after_a_failed_overwrite_stays_away(tmp_path: Path) -> None:
    """The device may hold it in both slots; only one of them is thought to be good."""
    fill(tmp_path)
    store = faulty(tmp_path, FaultPlan({2: Fault.ERROR}))
    assert store.write([write_of(9, 1)]) == [DONE]
    assert store.write([write_of(1, 50)]) != [DONE]
    assert store.erase([9]) == [DONE]
    store.close()
    again = open_nvme(tmp_path)
    assert key_of(1) not in {block.key for block in again.recover()}
    again.close()


@pytest.mark.parametrize("seed", range(5))
def test_a_sick_device_never_makes_it_serve_wrong_bytes(tmp_path: Path, seed: int) -> None:
    plan = FaultPlan(rates=dict.fromkeys(Fault, 0.05), seed=seed)
    store = faulty(tmp_path, plan)
    chance = random.Random(seed)
    last: dict[int, int] = {}
    for turn in range(300):
        slot = chance.randrange(16)
        if chance.random() < 0.4:
            store.write([write_of(slot, turn)])
            last[slot] = turn
        elif slot in last:
            outcome, payload = read_back(store, slot, last[slot])
            assert outcome != DONE or payload == payload_of(last[slot])
    assert {*plan.injected} == {*Fault}
    store.close()


class CountingIo(FaultyIo):
    """Notes every call: without a queue of its own, each operation becomes one."""

    def __init__(self, inner: IoEngine, calls: list[tuple[str, int]]) -> None:
        super().__init__(inner, FaultPlan())
        self._calls = calls

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._calls.append(("read", len(buffers)))
        return super().preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._calls.append(("write", len(buffers)))
        super().pwritev(buffers, offset)

    def sync(self) -> None:
        self._calls.append(("sync", 0))
        super().sync()


def test_adjacent_slots_are_one_operation(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    store = open_nvme(tmp_path, open_io=lambda path, size: CountingIo(PosixIo(path, size), calls))
    store.write([write_of(n, n) for n in (5, 3, 4, 9)])
    assert sorted(calls[:2]) == [("write", 2), ("write", 6)]
    assert calls[2:] == [("sync", 0)]
    calls.clear()
    store.read([SlotRead(n, key_of(n), aligned(PAYLOAD_BYTES)) for n in (4, 3, 5)])
    assert calls == [("read", 6)]
    store.close()


@pytest.mark.full
def test_recovery_is_quick(tmp_path: Path) -> None:
    """100,000 slots: below 3 s from the index, below 20 s from the headers alone."""
    capacity, size = 100_000, 4096
    store = open_nvme(tmp_path, capacity, size)
    payload = aligned(size)
    for start in range(0, capacity, 1000):
        keys = [(slot, key_of(slot)) for slot in range(start, start + 1000)]
        batch = [SlotWrite(slot, key, key, bytes(64), payload) for slot, key in keys]
        assert store.write(batch) == [DONE] * 1000
    store.close()
    for limit_s in (3.0, 20.0):
        start_s = time.monotonic()
        store = open_nvme(tmp_path, capacity, size)
        assert len(store.recover()) == capacity
        assert time.monotonic() - start_s < limit_s
        store.close()
        remove_index(tmp_path)
