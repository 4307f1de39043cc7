"""What every `Mover` must do, run over each that there is; then what the one with threads adds."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fake_gpu import FakeGpu
from mover_worlds import (
    CPU,
    EVEN,
    EXPECTED,
    GPU,
    LARGE,
    NVME,
    ODD,
    PATIENCE_S,
    SLOTS,
    AnsweringStore,
    CudaWorld,
    LedgerWorld,
    Model,
    ThreadWorld,
    World,
    block_the_link,
    finish,
    mem,
    move,
    pairs,
    raising,
)
from sim_world import SimWorld
from store_blocks import key_of, open_nvme

from tierkv.cache.layout import KVLayout
from tierkv.cache.mover import ThreadMover
from tierkv.cache.pools import GpuPool
from tierkv.errors import InvariantError
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore, Cause, Failure
from tierkv.storage.faults import Fault, FaultPlan, FaultyStore
from tierkv.storage.mem_store import MemStore
from tierkv.types import Move, MoveFailure, MovePriority, MoveResult


def nvme(path: Path, layout: KVLayout) -> BlockStore:
    return open_nvme(path / "store", SLOTS, layout.slot_bytes)


def half_registered() -> FakeGpu:
    """All but the arena's memory can be registered, and 9 slots of that."""
    buffers, staging, readers = 5 * 2 * 2, 8, 2 * 4
    slots = buffers + staging + readers + 9
    return FakeGpu(random.randrange(1 << 32), register_bytes=slots * EVEN.slot_bytes)


MAKERS: dict[str, Callable[[Path], World | SimWorld]] = {
    "memory": lambda path: ThreadWorld(EVEN, mem()),
    "memory, staged": lambda path: ThreadWorld(ODD, mem(ODD)),
    "one by one": lambda path: ThreadWorld(
        ODD, mem(ODD), copy_bytes=1, write_bytes=1, read_bytes=1
    ),
    "nvme": lambda path: ThreadWorld(EVEN, nvme(path, EVEN)),
    "nvme, staged": lambda path: ThreadWorld(ODD, nvme(path, ODD)),
    "no arena": lambda path: ThreadWorld(EVEN, mem(), has_arena=False),
    "no arena, staged": lambda path: ThreadWorld(ODD, mem(ODD), has_arena=False),
    "no store": lambda path: ThreadWorld(ODD),
    "gpu": lambda path: CudaWorld(EVEN, mem(), sizes=LARGE),
    "gpu, gathered": lambda path: CudaWorld(ODD, mem(ODD)),
    "gpu, one by one": lambda path: CudaWorld(
        ODD, mem(ODD), copy_bytes=1, write_bytes=1, read_bytes=1
    ),
    "gpu, half is registered": lambda path: CudaWorld(
        EVEN, mem(), gpu=half_registered(), sizes=LARGE
    ),
    "gpu, no arena": lambda path: CudaWorld(EVEN, nvme(path, EVEN), has_arena=False, sizes=LARGE),
    "gpu, no store": lambda path: CudaWorld(ODD),
    "ledger": lambda path: LedgerWorld(is_eager=False),
    "eager ledger": lambda path: LedgerWorld(is_eager=True),
    "virtual time": lambda path: SimWorld(),
}


@pytest.fixture(params=MAKERS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World | SimWorld]:
    made = MAKERS[request.param](tmp_path)
    yield made
    made.close()


# ---------------------------------------------------------------------- every mover


def test_bytes_arrive_between_every_pair_of_tiers(world: World) -> None:
    ways = pairs(world.tiers)
    for number, (source, _) in enumerate(ways):
        world.fill(source, number, number)
    moves = [move(n, n, (a, n), (b, SLOTS - 1 - n)) for n, (a, b) in enumerate(ways)]
    world.mover.begin(moves)
    results = finish(world.mover, len(moves))
    assert sorted(result.ticket for result in results) == list(range(len(moves)))
    assert all(result.failure is None and result.seconds >= 0 for result in results)
    for number, (source, destination) in enumerate(ways):
        assert world.holds(source, number, number)
        assert world.holds(destination, SLOTS - 1 - number, number)
    assert world.mover.poll() == []


def test_nothing_to_do(world: World) -> None:
    world.mover.begin([])
    world.mover.wait(0.01)
    assert world.mover.poll() == []


def test_thousands_of_moves_do_what_a_model_says(world: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    model = Model(world, seed, abandons=True)
    end = time.monotonic() + 20
    while model.num_begun < 3000 and time.monotonic() < end:
        model.begin(model.rng.randint(1, 12))
        if model.rng.random() < 0.3:
            world.mover.wait(0.001)
        assert all(result.failure is None for result in model.poll())
        if model.rng.random() < 0.01:
            model.drain()
            model.check(world.tiers)
    assert all(result.failure is None for result in model.drain())
    model.check(world.tiers)
    assert model.num_begun > 500


# ---------------------------------------------------------------------- failures


BOTH_WAYS = [move(1, 1, (GPU, 0), (NVME, 0)), move(2, 2, (NVME, 1), (GPU, 1))]


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("layout", [EVEN, ODD])
def test_every_cause_has_its_failure(cause: Cause, layout: KVLayout, worlds) -> None:
    world = worlds(layout, AnsweringStore(mem(layout), lambda: Failure(cause)))
    world.mover.begin(BOTH_WAYS)
    assert {result.failure for result in finish(world.mover, 2)} == {EXPECTED[cause]}


def test_an_os_error_is_a_failure(worlds) -> None:
    world = worlds(EVEN, AnsweringStore(mem(), partial(raising, OSError("no device"))))
    for _ in range(2):  # the threads live on
        world.mover.begin(BOTH_WAYS)
        failures = {result.failure for result in finish(world.mover, 2)}
        assert failures == {MoveFailure.IO_ERROR}


@pytest.mark.parametrize("index", [0, 1])
def test_a_bug_is_raised_where_the_engine_polls(index: int, worlds) -> None:
    world = worlds(EVEN, AnsweringStore(mem(), partial(raising, InvariantError("a bug"))))
    world.mover.begin([BOTH_WAYS[index]])
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(InvariantError, match="a bug"):
            finish(world.mover, 1)
    assert time.monotonic() - start < PATIENCE_S / 2
    world.mover.close()


@pytest.mark.parametrize("layout", [EVEN, ODD])
def test_on_a_sick_device_what_arrives_is_right(layout: KVLayout, worlds) -> None:
    rates = dict.fromkeys(Fault, 0.03)
    world = worlds(layout, FaultyStore(mem(layout), FaultPlan(rates=rates, seed=1)))
    model = Model(world, seed=2)
    results: list[MoveResult] = []
    while model.num_begun < 2000:
        model.begin(5)
        results += model.poll()
        if model.num_begun % 100 < 5:
            results += model.drain()
            model.check([GPU, CPU])
    results += model.drain()
    model.check([GPU, CPU])
    assert len(results) == model.num_begun
    failures = Counter(result.failure for result in results)
    assert {MoveFailure.IO_ERROR, MoveFailure.CORRUPT, MoveFailure.NO_SPACE} <= set(failures)
    assert failures[None] > 500


def test_what_was_erased_is_lost(worlds) -> None:
    store = mem()
    world = worlds(EVEN, store)
    for number in range(3):
        world.fill(GPU, number, number)
    world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in range(3)])
    finish(world.mover, 3)
    world.mover.erase([1, 1])
    world.mover.begin([move(7, 3, (GPU, 0), (NVME, 9))])  # goes after the erasure
    finish(world.mover, 1)
    world.mover.begin([move(n, n, (NVME, n), (GPU, 10 + n)) for n in range(3)])
    failures = {result.ticket: result.failure for result in finish(world.mover, 3)}
    assert failures == {0: None, 1: MoveFailure.LOST, 2: None}


def test_what_a_store_is_told(worlds) -> None:
    store = mem()
    world = worlds(EVEN, store)
    private = Move(2, key_of(9), b"", b"", CPU, 0, NVME, 5, MovePriority.SWAP_OUT)
    world.mover.begin([move(1, 7, (GPU, 0), (NVME, 3)), private])
    finish(world.mover, 2)
    first, second = store.recover()
    assert (first.slot, first.key, first.parent) == (3, key_of(7), key_of(6))
    assert first.tokens == (7).to_bytes(4, "little")
    assert (second.slot, second.key, second.parent, second.tokens) == (5, key_of(9), bytes(16), b"")


# ---------------------------------------------------------------------- order and bounds


@pytest.mark.parametrize("is_read", [False, True])
def test_the_most_urgent_goes_first(is_read: bool, gated) -> None:
    size = EVEN.slot_bytes
    world = gated(write_bytes=size, read_bytes=size, num_readers=1)
    block_the_link(world, is_read)
    priorities = [MovePriority(n) for n in (3, 1, 2, 0, 3, 1, 0, 2, 0)]
    for n, priority in enumerate(priorities, start=1):
        above = (CPU if n % 2 else GPU, n)
        ends = ((NVME, n), above) if is_read else (above, (NVME, n))
        world.mover.begin([move(n, n, *ends, priority)])
    world.store.opened.set()
    finish(world.mover, 1 + len(priorities))
    expected = sorted(range(1, 10), key=lambda n: (priorities[n - 1], n))
    assert world.store.batches == [[n] for n in (0, *expected)]


def test_a_batch_has_a_bound_and_one_priority(gated) -> None:
    world = gated(write_bytes=4 * EVEN.slot_bytes + 1)
    block_the_link(world, is_read=False)
    late = [move(n, n, (GPU, n), (NVME, n), MovePriority.WRITE_BACK) for n in range(1, 8)]
    soon = [move(n, n, (CPU, n), (NVME, n), MovePriority.SWAP_OUT) for n in range(8, 10)]
    world.mover.begin([*late, *soon])
    world.store.opened.set()
    finish(world.mover, 10)
    assert world.store.batches == [[0], [8, 9], [1, 2, 3, 4], [5, 6, 7]]


def test_a_blocked_link_holds_up_no_other(gated) -> None:
    world = gated()
    block_the_link(world, is_read=False)
    world.fill(GPU, 1, 1)
    world.mover.begin([move(1, 1, (GPU, 1), (CPU, 1))])
    assert [result.ticket for result in finish(world.mover, 1)] == [1]
    world.mover.begin([move(2, 1, (CPU, 1), (GPU, 5))])
    assert [result.ticket for result in finish(world.mover, 1)] == [2]
    assert world.holds(GPU, 5, 1)


def longest_pause(mover: ThreadMover) -> tuple[float, float]:
    """Seconds between two polls at most, until a result came; and those of the result."""
    longest, before = 0.0, time.perf_counter()
    while not (results := mover.poll()):
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    return max(longest, time.perf_counter() - before), results[0].seconds


def test_copying_holds_no_lock() -> None:
    """The engine's thread runs while one block of 128 MiB is copied."""
    layout = KVLayout(64, 2, 1024, 256, "bfloat16")
    pool, arena = GpuPool(layout, 1, "cpu"), HostArena(1, layout.block_bytes)
    mover = ThreadMover(pool, arena)
    shares = [1.0]
    for ticket in range(50):  # on a busy machine other processes make pauses too
        mover.begin([move(ticket, 0, (GPU, 0), (CPU, 0))])
        pause, seconds = longest_pause(mover)
        shares.append(pause / seconds)
        if shares[-1] < 0.5:  # a lock that is held makes it 1
            break
    mover.close()
    assert min(shares) < 0.5, shares


# ---------------------------------------------------------------------- the end


def test_closing_ends_what_has_begun(gated) -> None:
    world = gated(write_bytes=1)
    for number in range(6):
        world.fill(GPU, number, number)
    block_the_link(world, is_read=False)
    world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in range(1, 6)])
    threading.Timer(0.2, world.store.opened.set).start()
    world.mover.close()
    results = world.mover.poll()
    assert [(r.ticket, r.failure) for r in results] == [(n, None) for n in range(6)]
    assert all(world.holds(NVME, n, n) for n in range(6))
    world.mover.close()
    with pytest.raises(InvariantError, match="closed"):
        world.mover.begin(BOTH_WAYS)


def test_closing_waits_for_a_stuck_device_only_so_long(gated) -> None:
    world = gated(write_bytes=1, close_timeout_s=0.1)
    block_the_link(world, is_read=False)
    world.mover.begin([move(n, n, (GPU, n), (NVME, n)) for n in (1, 2)])
    world.mover.close()
    results = world.mover.poll()
    assert [(r.ticket, r.failure) for r in results] == [
        (1, MoveFailure.UNAVAILABLE),
        (2, MoveFailure.UNAVAILABLE),
    ]
    world.store.opened.set()
    assert [r.ticket for r in finish(world.mover, 1)] == [0]


def test_closing_ends_the_threads(worlds) -> None:
    def threads() -> set[str]:
        return {t.name for t in threading.enumerate() if t.name.startswith("tierkv-")}

    before = threads()
    world = worlds(EVEN, mem(), num_readers=3)
    assert len(threads() - before) == 7
    world.mover.close()
    assert threads() == before


# ---------------------------------------------------------------------- callers' bugs


@pytest.mark.parametrize(
    ("source", "destination", "has_arena", "has_store"),
    [
        (GPU, CPU, False, True),
        (CPU, NVME, False, True),
        (NVME, GPU, True, False),
        (GPU, GPU, True, True),
    ],
)
def test_moves_need_a_link(source, destination, has_arena, has_store, worlds) -> None:
    world = worlds(EVEN, mem() if has_store else None, has_arena=has_arena)
    with pytest.raises(InvariantError, match=f"no link {source.value} -> {destination.value}"):
        world.mover.begin([move(1, 1, (source, 0), (destination, 1))])


def test_erasing_needs_a_store(worlds) -> None:
    with pytest.raises(InvariantError, match="no store"):
        worlds(EVEN).mover.erase([1])


def test_tiers_must_have_slots_of_one_size() -> None:
    pool = GpuPool(ODD, 2, "cpu")
    with pytest.raises(InvariantError, match="arena's blocks have 8192 bytes, the pool's 6144"):
        ThreadMover(pool, HostArena(2, 8192))
    with pytest.raises(InvariantError, match="store's slots have 6144 bytes, the layout's 8192"):
        ThreadMover(pool, None, MemStore(2, 6144))


def test_slots_outside_are_a_bug(worlds) -> None:
    world = worlds(EVEN)
    world.mover.begin([move(1, 1, (GPU, 0), (CPU, SLOTS))])
    world.mover.wait(PATIENCE_S)
    with pytest.raises(IndexError):
        world.mover.poll()
