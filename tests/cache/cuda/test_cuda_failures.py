"""A GPU that fails or hangs: the engine hears of it, and nothing waits for ever."""

from __future__ import annotations

import pickle
import time

import pytest
from fake_gpu import FakeGpu
from mover_worlds import CPU, GPU, LARGE, NVME, ODD, PATIENCE_S, SMALL, CudaWorld, mem, move

from tierkv.errors import DeviceError
from tierkv.types import MoveFailure

WAYS = [(GPU, CPU), (CPU, GPU), (GPU, NVME), (NVME, GPU)]


def hold_copies(gpu: FakeGpu) -> None:
    for stream in gpu.streams:
        gpu.hold(stream)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize("ends", WAYS)
def test_a_failed_gpu_is_an_error_of_the_next_poll(ends, sizes) -> None:
    world = CudaWorld(ODD, mem(ODD), sizes=sizes)
    world.mover.warm_up(PATIENCE_S)
    world.fill(ends[0], 0, 1)
    world.gpu.settle()
    hold_copies(world.gpu)
    world.mover.begin([move(1, 1, (ends[0], 0), (ends[1], 1))])
    time.sleep(0.02)
    world.gpu.fail("an illegal memory access was encountered")
    start = time.monotonic()
    world.mover.wait(PATIENCE_S)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"illegal memory access.*restart the engine"):
            world.mover.poll()
    assert time.monotonic() - start < PATIENCE_S / 2
    world.close()


def test_a_failed_gpu_takes_no_moves() -> None:
    world = CudaWorld(ODD)
    world.gpu.fail("unspecified launch failure")
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        world.mover.begin([move(1, 1, (GPU, 0), (CPU, 1))])
    world.close()


def test_moves_between_the_other_tiers_go_on() -> None:
    world = CudaWorld(ODD, mem(ODD))
    world.mover.warm_up(PATIENCE_S)
    world.fill(CPU, 0, 1)
    world.gpu.fail("unspecified launch failure")
    world.mover.begin([move(1, 1, (CPU, 0), (NVME, 1))])
    world.mover.wait(PATIENCE_S)
    assert [result.failure for result in world.mover.poll()] == [None]
    world.close()


def test_a_gpu_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []
    monkeypatch.setattr("tierkv.cache.cuda.mover._left_behind", left)
    world = CudaWorld(ODD, sizes=LARGE, close_timeout_s=0.05, copy_bytes=1)
    world.mover.warm_up(PATIENCE_S)
    world.gpu.settle()
    hold_copies(world.gpu)
    world.mover.begin([move(n, n, (GPU, n), (CPU, n)) for n in range(8)])
    time.sleep(0.02)
    start = time.monotonic()
    world.mover.close()
    assert time.monotonic() - start < PATIENCE_S / 2
    failures = {result.ticket: result.failure for result in world.mover.poll()}
    assert set(failures.values()) == {MoveFailure.UNAVAILABLE}
    assert not {0, 1} & set(failures), "what was issued may still arrive"
    assert world.gpu.ranges and left, "memory that a copy may use stays as it is"
    for stream in world.gpu.streams:
        world.gpu.let_go(stream)
    world.gpu.close()


def test_there_is_no_mover_for_a_gpu_that_has_failed() -> None:
    gpu = FakeGpu()
    gpu.fail("unspecified launch failure")
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        CudaWorld(ODD, gpu=gpu)
    gpu.close()


def test_a_gpu_that_fails_while_memory_is_registered(caplog) -> None:
    gpu = FakeGpu()
    gpu.slow_bytes = 5 * ODD.slot_bytes
    world = CudaWorld(ODD, gpu=gpu, piece_bytes=5 * ODD.slot_bytes)
    gpu.fail("unspecified launch failure")
    gpu.may_register.set()
    world.mover.warm_up(PATIENCE_S)
    with pytest.raises(DeviceError):
        world.mover.begin([move(1, 1, (GPU, 0), (CPU, 1))])
    world.close()
    assert "unspecified launch failure" in caplog.text


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(DeviceError("copy blocks", "no reason")))
    assert str(error).startswith("the GPU failed while it was to copy blocks (no reason)")
