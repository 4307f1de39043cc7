"""What every `BlockStore` must do, run over each that there is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from store_blocks import PAYLOAD_BYTES, cause, key_of, open_nvme, payload_of, read_back, write_of

from tierkv.errors import InvariantError
from tierkv.storage.base import DONE, BlockStore, Cause, SlotRead, SlotWrite
from tierkv.storage.faults import FaultPlan, FaultyIo, FaultyStore
from tierkv.storage.io import IoEngine
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.mem_store import MemStore
from tierkv.storage.quarantine import QuarantinedStore

CAPACITY = 16
ODD_BYTES = 5000
"""A payload that is no multiple of 4 KiB: staged, never used in place."""


def without_queue(path: Path, num_bytes: int) -> IoEngine:
    """An engine whose operations are for threads."""
    return FaultyIo(PosixIo(path, num_bytes), FaultPlan())


MAKERS: dict[str, Callable[[Path], BlockStore]] = {
    "memory": lambda path: MemStore(CAPACITY, PAYLOAD_BYTES),
    "nvme direct": lambda path: open_nvme(path, CAPACITY),
    "nvme buffered": lambda path: open_nvme(path, CAPACITY, open_io=partial(PosixIo, direct=False)),
    "nvme threads": lambda path: open_nvme(path, CAPACITY, open_io=without_queue),
    "nvme odd size": lambda path: open_nvme(path, CAPACITY, ODD_BYTES),
    "faulty": lambda path: FaultyStore(MemStore(CAPACITY, PAYLOAD_BYTES), FaultPlan()),
    "quarantined": lambda path: QuarantinedStore(MemStore(CAPACITY, PAYLOAD_BYTES), lambda: 0.0),
    "quarantined nvme": lambda path: QuarantinedStore(open_nvme(path, CAPACITY), lambda: 0.0),
}


@pytest.fixture(params=MAKERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockStore]:
    made = MAKERS[request.param](tmp_path / "store")
    yield made
    made.close()


def put(store: BlockStore, slot: int, number: int) -> None:
    assert store.write([write_of(slot, number, store.slot_payload_bytes)]) == [DONE]


def expect(store: BlockStore, slot: int, number: int) -> None:
    outcome, payload = read_back(store, slot, number)
    assert outcome == DONE
    assert payload == payload_of(number, store.slot_payload_bytes)


def expect_miss(store: BlockStore, slot: int, number: int) -> None:
    assert cause(read_back(store, slot, number)[0]) is Cause.NOT_FOUND


def held(store: BlockStore) -> dict[int, bytes]:
    return {block.slot: block.key for block in store.recover()}


def test_what_was_written_is_read(store: BlockStore) -> None:
    put(store, 3, 100)
    expect(store, 3, 100)


def test_a_batch_answers_in_its_order(store: BlockStore) -> None:
    size = store.slot_payload_bytes
    slots = [7, 2, 3, 15, 4, 0]
    assert store.write([write_of(slot, slot, size) for slot in slots]) == [DONE] * 6
    outs = [memoryview(bytearray(size)) for _ in range(7)]
    reads = [SlotRead(s, key_of(s), out) for s, out in zip([*slots, 9], outs, strict=True)]
    *found, missed = store.read(reads)
    assert found == [DONE] * 6
    assert cause(missed) is Cause.NOT_FOUND
    assert [bytes(out) for out in outs[:6]] == [payload_of(slot, size) for slot in slots]


def test_unaligned_buffers_work(store: BlockStore) -> None:
    size = store.slot_payload_bytes
    payload = memoryview(bytearray(b"." + payload_of(1, size)))[1:]
    assert store.write([SlotWrite(1, key_of(1), key_of(0), b"", payload)]) == [DONE]
    out = memoryview(bytearray(size + 1))[1:]
    assert store.read([SlotRead(1, key_of(1), out)]) == [DONE]
    assert bytes(out) == payload_of(1, size)


def test_empty_batches(store: BlockStore) -> None:
    assert store.write([]) == store.read([]) == store.erase([]) == []


def test_another_key_or_an_empty_slot_is_a_miss(store: BlockStore) -> None:
    put(store, 3, 100)
    expect_miss(store, 3, 101)
    expect_miss(store, 4, 100)


def test_overwriting_replaces(store: BlockStore) -> None:
    put(store, 3, 100)
    put(store, 3, 200)
    expect_miss(store, 3, 100)
    expect(store, 3, 200)
    assert held(store) == {3: key_of(200)}


def test_erasing_empties(store: BlockStore) -> None:
    for slot in range(4):
        put(store, slot, slot)
    assert store.erase([1, 3, 9]) == [DONE] * 3
    expect_miss(store, 1, 1)
    assert held(store) == {0: key_of(0), 2: key_of(2)}
    put(store, 1, 50)
    expect(store, 1, 50)


def test_of_equal_keys_the_newest_counts(store: BlockStore) -> None:
    for slot in (9, 2, 5):
        put(store, slot, 100)
    assert held(store) == {5: key_of(100)}
    expect(store, 9, 100)
    store.erase([9])
    assert held(store) == {5: key_of(100)}
    put(store, 9, 100)
    store.erase([9])
    assert held(store) == {}


def test_recover_tells_what_was_written(store: BlockStore) -> None:
    write = write_of(6, 42, store.slot_payload_bytes)
    store.write([write_of(2, 41, store.slot_payload_bytes), write])
    first, second = store.recover()
    assert (first.slot, second.slot) == (2, 6)
    assert (second.key, second.parent, second.tokens) == (write.key, write.parent, write.tokens)
    assert second.generation > first.generation
    assert second.hits == 0


def test_touching_counts(store: BlockStore) -> None:
    put(store, 6, 42)
    store.touch([6, 7])
    store.touch([6])
    store.flush()
    (block,) = store.recover()
    assert block.hits == 2
    expect(store, 6, 42)


def test_a_closed_store_says_so(store: BlockStore) -> None:
    put(store, 1, 1)
    store.close()
    store.close()
    assert cause(read_back(store, 1, 1)[0]) is Cause.CLOSED
    assert cause(store.write([write_of(1, 1, store.slot_payload_bytes)])[0]) is Cause.CLOSED
    assert cause(store.erase([1])[0]) is Cause.CLOSED
    store.flush()
    store.touch([1])


def test_counters(store: BlockStore) -> None:
    put(store, 1, 1)
    put(store, 2, 2)
    expect(store, 1, 1)
    expect_miss(store, 5, 5)
    store.erase([2])
    stats = store.stats()
    assert (stats.writes, stats.reads, stats.erases) == (2, 2, 1)
    assert stats.written_bytes == 2 * store.slot_payload_bytes
    assert stats.read_bytes == store.slot_payload_bytes
    assert stats.failures == {Cause.NOT_FOUND: 1}


@pytest.mark.parametrize("slot", [-1, CAPACITY])
def test_a_slot_that_does_not_exist_is_a_bug(store: BlockStore, slot: int) -> None:
    with pytest.raises(InvariantError, match=f"slot {slot} of"):
        put(store, slot, 1)
    with pytest.raises(InvariantError):
        read_back(store, slot, 1)
    with pytest.raises(InvariantError):
        store.erase([slot])


def test_wrong_sizes_are_bugs(store: BlockStore) -> None:
    size = store.slot_payload_bytes
    good = write_of(1, 1, size)
    bad = [
        SlotWrite(1, good.key, good.parent, b"", good.payload[:-1]),
        SlotWrite(1, good.key[:-1], good.parent, b"", good.payload),
        SlotWrite(1, good.key, b"", b"", good.payload),
        SlotWrite(1, good.key, good.parent, bytes(1025), good.payload),
    ]
    for write in bad:
        with pytest.raises(InvariantError):
            store.write([write])
    with pytest.raises(InvariantError):
        store.write([good, good])
    with pytest.raises(InvariantError):
        store.read([SlotRead(1, good.key, memoryview(bytes(size)))])
    assert held(store) == {}
    put(store, 1, 1)


def test_threads(store: BlockStore) -> None:
    """Each thread has its own slots; every answer must be right, whatever the others do."""
    size = store.slot_payload_bytes
    errors: list[object] = []

    def work(thread: int) -> None:
        slots = range(thread * 4, thread * 4 + 4)
        for turn in range(15):
            base = 1000 * thread + 10 * turn
            outcomes = store.write([write_of(slot, base + slot, size) for slot in slots])
            answers = [read_back(store, slot, base + slot) for slot in slots]
            right = [(DONE, payload_of(base + slot, size)) for slot in slots]
            if outcomes != [DONE] * 4 or answers != right:
                errors.append((thread, turn))
            if turn % 5 == 0:
                store.erase([slots[0]])
            store.touch(slots)
            store.recover()

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_closing_waits_for_those_inside(store: BlockStore) -> None:
    size = store.slot_payload_bytes
    outcomes: list[Cause | None] = []

    def work() -> None:
        while Cause.CLOSED not in outcomes:
            outcomes.extend(map(cause, store.write([write_of(s, s, size) for s in range(8)])))

    thread = threading.Thread(target=work)
    thread.start()
    while not outcomes:
        pass
    store.close()
    thread.join()
    assert set(outcomes) == {None, Cause.CLOSED}
