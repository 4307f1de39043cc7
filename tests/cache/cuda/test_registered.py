"""Host memory that is registered piece by piece, while blocks move already."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
from fake_gpu import FakeGpu
from mover_worlds import (
    CPU,
    GPU,
    LARGE,
    ODD,
    PATIENCE_S,
    SLOTS,
    SMALL,
    CudaWorld,
    finish,
    mem,
    move,
)

from tierkv.cache.cuda import registered
from tierkv.cache.cuda.lanes import LaneSizes
from tierkv.cache.cuda.mover import CudaMover
from tierkv.cache.cuda.registered import RegisteredMemory
from tierkv.errors import ConfigError, DeviceError
from tierkv.storage.arena import HostArena

SLOT = ODD.slot_bytes


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    made = FakeGpu()
    yield made
    made.may_register.set()
    made.close()


def there_and_back(world: CudaWorld, first_ticket: int = 0) -> None:
    """Every slot of the arena is written by the device and read by it."""
    for slot in range(SLOTS):
        world.fill(GPU, slot, first_ticket + slot)
    tickets = range(first_ticket, first_ticket + SLOTS)
    world.mover.begin([move(t, t, (GPU, n), (CPU, SLOTS - 1 - n)) for n, t in enumerate(tickets)])
    finish(world.mover, SLOTS)
    assert all(world.holds(CPU, SLOTS - 1 - n, t) for n, t in enumerate(tickets))
    for slot in range(SLOTS):
        world.fill(GPU, slot, 999)
    world.mover.begin([move(t, t, (CPU, SLOTS - 1 - n), (GPU, n)) for n, t in enumerate(tickets)])
    finish(world.mover, SLOTS)
    assert all(world.holds(GPU, n, t) for n, t in enumerate(tickets))


# ---------------------------------------------------------------------- pieces


@pytest.mark.parametrize("piece", [1, SLOT, SLOT + 4096, 3 * SLOT, 100 * SLOT])
def test_pieces_are_whole_slots_and_cover_all(piece: int, gpu: FakeGpu) -> None:
    arena = HostArena(10, ODD.block_bytes)
    memory = RegisteredMemory(gpu, arena, piece_bytes=piece)
    memory.start()
    assert memory.wait(PATIENCE_S)
    assert memory.num_registered == 10 and memory.is_registered(9)
    assert sum(gpu.ranges.values()) == arena.num_bytes
    for start, size in gpu.ranges.items():
        assert (start - arena.address) % SLOT == size % SLOT == 0
        assert size <= max(piece, SLOT)
    memory.close()
    assert gpu.ranges == {} and not memory.is_registered(0)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_no_slot_crosses_a_border(sizes: LaneSizes) -> None:
    world = CudaWorld(ODD, mem(ODD), sizes=sizes, piece_bytes=SLOT + 4096)
    world.mover.warm_up(PATIENCE_S)
    there_and_back(world)
    world.close()
    assert world.gpu.ranges == {}


def test_a_slot_across_a_border_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "slots_of_a_piece", lambda piece_bytes, stride: 1.5)
    world = CudaWorld(ODD, sizes=LaneSizes(direct_bytes=0, buffer_bytes=SLOT))
    world.mover.warm_up(PATIENCE_S)
    with pytest.raises(DeviceError, match="InvalidValue"):
        there_and_back(world)
    world.close()


# ---------------------------------------------------------------------- in the background


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_blocks_move_while_memory_is_registered(sizes: LaneSizes, gpu: FakeGpu) -> None:
    gpu.slow_bytes = 5 * SLOT  # pieces of the arena, and of nothing else
    world = CudaWorld(ODD, gpu=gpu, sizes=sizes, piece_bytes=5 * SLOT)
    there_and_back(world)
    assert not any(size >= gpu.slow_bytes for size in gpu.ranges.values())
    gpu.may_register.set()
    world.mover.warm_up(PATIENCE_S)
    there_and_back(world, first_ticket=SLOTS)
    assert sum(gpu.ranges.values()) >= world.arena.num_bytes
    world.close()


def test_registered_slots_need_no_buffer(gpu: FakeGpu) -> None:
    world = CudaWorld(ODD, gpu=gpu, sizes=LARGE)
    world.mover.warm_up(PATIENCE_S)
    there_and_back(world)
    calls = gpu.calls.copy()
    assert calls["to_host"] + calls["to_device"] <= 4, "one call for a batch, however many blocks"
    world.close()


def test_closing_does_not_wait_for_the_rest(gpu: FakeGpu, caplog, monkeypatch) -> None:
    monkeypatch.setattr("tierkv.cache.cuda.mover._UNREGISTER_S", 0.05)
    gpu.slow_bytes = 5 * SLOT
    world = CudaWorld(ODD, gpu=gpu, piece_bytes=5 * SLOT)
    there_and_back(world)
    world.mover.close()
    assert "registering host memory is stuck" in caplog.text
    num_calls = gpu.calls["register"]
    gpu.may_register.set()
    end = time.monotonic() + PATIENCE_S
    while gpu.ranges and time.monotonic() < end:
        time.sleep(0.001)
    assert (gpu.ranges, gpu.calls["register"]) == ({}, num_calls), "it ends, and is given back"


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_a_refusal_is_one_warning_and_no_more(sizes: LaneSizes, caplog) -> None:
    gpu = FakeGpu(register_bytes=2 * 2 * 4 * SLOT + 7 * SLOT)
    with caplog.at_level(logging.WARNING):
        world = CudaWorld(ODD, gpu=gpu, sizes=sizes)
        world.mover.warm_up(PATIENCE_S)
        there_and_back(world)
        world.close()
    (warning,) = caplog.records
    text = warning.getMessage()
    assert f"of {world.arena.num_bytes} bytes of the CPU tier are page-locked" in text
    assert "Lower cpu_cache_size" in text and "out of memory" in text
    assert gpu.ranges == {}


def test_staging_memory_that_cannot_be_registered_works_too(caplog) -> None:
    gpu = FakeGpu(register_bytes=5 * 2 * 4 * 6144)
    world = CudaWorld(ODD, mem(ODD), gpu=gpu, has_arena=False, staging_bytes=64 * SLOT)
    for slot in range(SLOTS):
        world.fill(GPU, slot, slot)
    nvme = world.tiers[1]
    world.mover.begin([move(n, n, (GPU, n), (nvme, n)) for n in range(SLOTS)])
    finish(world.mover, SLOTS)
    assert all(world.holds(nvme, n, n) for n in range(SLOTS))
    world.mover.begin([move(n, n, (nvme, n), (GPU, SLOTS - 1 - n)) for n in range(SLOTS)])
    finish(world.mover, SLOTS)
    assert all(world.holds(GPU, SLOTS - 1 - n, n) for n in range(SLOTS))
    assert "of staging memory are page-locked" in caplog.text
    world.close()


@pytest.mark.parametrize("num_bytes", [0, 5 * 4 * 6144])
def test_without_page_locked_memory_for_buffers_there_is_no_mover(num_bytes: int) -> None:
    gpu = FakeGpu(register_bytes=num_bytes)
    with pytest.raises(ConfigError, match=r"page-locked memory.*ulimit"):
        CudaWorld(ODD, mem(ODD), gpu=gpu)
    assert gpu.ranges == {}
    gpu.close()


def test_a_mover_for_the_real_device_needs_a_pool_there() -> None:
    world = CudaWorld(ODD)
    with pytest.raises(Exception, match="a pool on cpu needs another mover"):
        CudaMover(world.pool)
    world.close()
