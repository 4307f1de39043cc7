"""What a copy may overtake: moves on a fake GPU, and the same checks with one wait left out.

Every check is a function that raises AssertionError when bytes are wrong, so that it can be shown
to fail when the wait it is about is taken away.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from fake_gpu import FakeEvent, FakeGpu, FakeStream
from mover_worlds import (
    CPU,
    EVEN,
    GPU,
    LARGE,
    NVME,
    ODD,
    PATIENCE_S,
    SLOTS,
    SMALL,
    CudaWorld,
    Model,
    finish,
    mem,
    move,
    payload,
)

from tierkv.cache.cuda.lanes import Lane, LaneSizes, Transfer
from tierkv.types import MovePriority, TierName

DOWN = [(GPU, CPU), (GPU, NVME)]
UP = [(CPU, GPU), (NVME, GPU)]
PAIRS = LaneSizes(buffer_bytes=2 * ODD.block_bytes)
SIZES = pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["gathered", "direct"])

Ends = tuple[TierName, TierName]
World = Callable[..., CudaWorld]


@pytest.fixture
def world() -> World:
    """Makes worlds; closed at the end."""
    made: list[CudaWorld] = []

    def make(sizes: LaneSizes = SMALL, **options: float) -> CudaWorld:
        made.append(CudaWorld(ODD, mem(ODD), sizes=sizes, **options))
        made[-1].mover.warm_up(PATIENCE_S)
        return made[-1]

    yield make
    for one in made:
        for stream in one.gpu.streams:
            one.gpu.let_go(stream)
        one.close()


def hold_copies(gpu: FakeGpu) -> None:
    for stream in gpu.streams:
        if stream is not gpu.compute:
            gpu.hold(stream)


def let_go(gpu: FakeGpu) -> None:
    for stream in gpu.streams:
        gpu.let_go(stream)


def until(is_so: Callable[[], bool]) -> None:
    """Return when it is so."""
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def bytes_of(world: CudaWorld, slot: int) -> bytes:
    return world.pool.tensor[slot].view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------- the compute stream first


def copies_wait_for_the_forward_that_wrote(world: CudaWorld, ends: Ends) -> None:
    """Blocks go down as the forward left them that ran when their moves began."""
    world.fill(GPU, 3, 1)
    world.gpu.settle()
    world.gpu.hold(world.gpu.compute)
    world.fill(GPU, 3, 2)
    world.mover.begin([move(1, 2, (ends[0], 3), (ends[1], 5))])
    until(lambda: len(world.mover._links[ends]._waiting[0]) == 0)
    time.sleep(0.02)
    world.gpu.settle()
    world.gpu.let_go(world.gpu.compute)
    assert [result.failure for result in finish(world.mover, 1)] == [None]
    assert world.holds(ends[1], 5, 2)


def copies_wait_for_the_forward_that_reads(world: CudaWorld, ends: Ends) -> None:
    """What comes into a slot comes after the last forward that read what was there."""
    seen: list[bytes] = []
    world.fill(GPU, 3, 1)
    world.fill(ends[0], 5, 2)
    world.gpu.settle()
    world.gpu.hold(world.gpu.compute)
    world.gpu.launch(lambda: seen.append(bytes_of(world, 3)))
    world.mover.begin([move(1, 2, (ends[0], 5), (GPU, 3))])
    until(lambda: len(world.mover._links[ends]._waiting[0]) == 0)
    time.sleep(0.02)
    world.gpu.settle()
    world.gpu.let_go(world.gpu.compute)
    finish(world.mover, 1)
    assert seen == [payload(1, ODD.block_bytes)]
    assert world.holds(GPU, 3, 2)


@SIZES
@pytest.mark.parametrize("ends", DOWN)
def test_copies_wait_for_the_forward_that_wrote(sizes, ends: Ends, world: World) -> None:
    copies_wait_for_the_forward_that_wrote(world(sizes), ends)


@SIZES
@pytest.mark.parametrize("ends", UP)
def test_copies_wait_for_the_forward_that_reads(sizes, ends: Ends, world: World) -> None:
    copies_wait_for_the_forward_that_reads(world(sizes), ends)


@SIZES
@pytest.mark.parametrize("ends", [*DOWN, *UP])
def test_without_the_wait_bytes_are_wrong(sizes, ends: Ends, world: World, monkeypatch) -> None:
    monkeypatch.setattr(FakeGpu, "wait", lambda gpu, stream, event: None)
    is_down = ends in DOWN
    check = (
        copies_wait_for_the_forward_that_wrote
        if is_down
        else copies_wait_for_the_forward_that_reads
    )
    with pytest.raises(AssertionError):
        check(world(sizes), ends)


@SIZES
def test_moves_of_one_batch_wait_for_a_forward_each(sizes, world: World) -> None:
    """The second of two moves that are issued together began after one more forward."""
    made = world(sizes, num_in_flight=1)
    for slot in range(3):
        made.fill(GPU, slot, slot)
    hold_copies(made.gpu)
    waiting = made.mover._links[GPU, CPU]._waiting[0]
    made.mover.begin([move(0, 0, (GPU, 0), (CPU, 0))])
    until(lambda: not waiting)
    made.mover.begin([move(1, 1, (GPU, 1), (CPU, 1))])
    made.gpu.settle()
    made.gpu.hold(made.gpu.compute)
    made.fill(GPU, 2, 9)
    made.mover.begin([move(2, 9, (GPU, 2), (CPU, 2))])
    for stream in made.gpu.streams:
        if stream is not made.gpu.compute:
            made.gpu.let_go(stream)
    until(lambda: not waiting)
    time.sleep(0.02)
    made.gpu.settle()
    made.gpu.let_go(made.gpu.compute)
    finish(made.mover, 3)
    assert all(made.holds(CPU, slot, n) for slot, n in enumerate([0, 1, 9]))


# ---------------------------------------------------------------------- reported when done


def nothing_is_reported_before_it_is_done(world: CudaWorld, ends: Ends) -> None:
    source, destination = ends
    world.fill(source, 3, 2)
    world.gpu.settle()
    hold_copies(world.gpu)
    world.mover.begin([move(1, 2, (source, 3), (destination, 5))])
    world.mover.wait(0.05)
    assert world.mover.poll_released() == []
    assert world.mover.poll() == []
    let_go(world.gpu)
    finish(world.mover, 1)
    assert world.holds(destination, 5, 2)


@SIZES
@pytest.mark.parametrize("ends", [*DOWN, *UP])
def test_nothing_is_reported_before_it_is_done(sizes, ends: Ends, world: World) -> None:
    nothing_is_reported_before_it_is_done(world(sizes), ends)


@SIZES
@pytest.mark.parametrize("ends", [*DOWN, *UP])
def test_reporting_early_is_seen(sizes, ends: Ends, world: World, monkeypatch) -> None:
    made = world(sizes)
    monkeypatch.setattr(FakeGpu, "synchronize", lambda gpu, event: None)
    monkeypatch.setattr(FakeGpu, "seconds_between", lambda gpu, start, end: 0.0)
    with pytest.raises(AssertionError):
        nothing_is_reported_before_it_is_done(made, ends)


# ---------------------------------------------------------------------- buffers


def a_buffer_is_used_again_when_it_is_empty(world: CudaWorld, ends: Ends) -> None:
    """More moves than buffers hold, all of which the copies' streams get before any is done."""
    source, destination = ends
    for slot in range(8):
        world.fill(source, slot, slot)
    world.gpu.settle()
    hold_copies(world.gpu)
    world.mover.begin([move(n, n, (source, n), (destination, 10 + n)) for n in range(8)])
    time.sleep(0.05)
    let_go(world.gpu)
    finish(world.mover, 8)
    wrong = [n for n in range(8) if not world.holds(destination, 10 + n, n)]
    assert not wrong


@pytest.mark.parametrize("ends", [*DOWN, *UP])
def test_a_buffer_is_used_again_when_it_is_empty(ends: Ends, world: World) -> None:
    a_buffer_is_used_again_when_it_is_empty(world(PAIRS), ends)


@pytest.mark.parametrize("ends", [*DOWN, *UP])
def test_using_a_buffer_early_is_seen(ends: Ends, world: World, monkeypatch) -> None:
    """A buffer is idle again when its copies were issued: those of the next part use it too."""
    start, made = Lane.start, world(PAIRS)

    def start_and_give_back(lane: Lane, part: object) -> Transfer:
        transfer = start(lane, part)
        lane._idle = [transfer.buffer]
        return transfer

    monkeypatch.setattr(Lane, "start", start_and_give_back)
    with pytest.raises(AssertionError):
        a_buffer_is_used_again_when_it_is_empty(made, ends)


# ---------------------------------------------------------------------- everything at random


class BusyModel(Model):
    """Forwards go on: each reads some blocks that it was launched for, whenever it runs."""

    def __init__(self, world: CudaWorld, seed: int) -> None:
        super().__init__(world, seed, abandons=True)
        self.num_read = 0
        self.misread: list[tuple[int, int]] = []

    def begin(self, count: int) -> None:
        super().begin(count)
        held = [(slot, n) for (tier, slot), n in self.held.items() if tier is GPU]
        if held:
            self._forward(*self.rng.choice(held))

    def _forward(self, slot: int, number: int) -> None:
        def kernel() -> None:
            self.num_read += 1
            if bytes_of(self.world, slot) != payload(number, self.world.layout.block_bytes):
                self.misread.append((slot, number))

        self.world.gpu.launch(kernel)


def moves_and_forwards_do_not_meet(world: CudaWorld, seed: int, num_moves: int) -> None:
    model = BusyModel(world, seed)
    is_held = False
    while model.num_begun < num_moves:
        if model.rng.random() < 0.1:
            is_held = not is_held
            (world.gpu.hold if is_held else world.gpu.let_go)(world.gpu.compute)
        model.begin(model.rng.randint(1, 6))
        world.mover.wait(0.001)
        model.poll()
    world.gpu.let_go(world.gpu.compute)
    model.drain()
    model.check(world.tiers)
    assert model.num_read > num_moves / 20
    assert not model.misread


@pytest.mark.parametrize("layout", [EVEN, ODD])
@SIZES
def test_moves_and_forwards_do_not_meet(sizes, layout) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    world = CudaWorld(layout, mem(layout), sizes=sizes, gpu=FakeGpu(seed))
    moves_and_forwards_do_not_meet(world, seed, 800)
    world.close()


def _never(gpu: FakeGpu, stream: FakeStream, event: FakeEvent) -> None:
    """No wait."""


def _at_once(lane: Lane, transfer: Transfer) -> float:
    """No look at the event."""
    if transfer.buffer is not None:
        lane._empty(transfer.part, transfer.buffer)
        lane._idle.append(transfer.buffer)
    return 0.0


@pytest.mark.parametrize(
    ("owner", "name", "planted"), [(FakeGpu, "wait", _never), (Lane, "finish", _at_once)]
)
def test_a_bug_is_found_by_chance_too(owner: type, name: str, planted, monkeypatch) -> None:
    monkeypatch.setattr(owner, name, planted)
    world = CudaWorld(ODD, mem(ODD), gpu=FakeGpu(1))
    with pytest.raises(AssertionError):
        moves_and_forwards_do_not_meet(world, 1, 800)
    world.gpu.let_go(world.gpu.compute)
    world.close()


# ---------------------------------------------------------------------- order and bounds


@SIZES
@pytest.mark.parametrize("ends", [(GPU, CPU), (CPU, GPU)])
def test_the_most_urgent_goes_first(sizes, ends: Ends, world: World) -> None:
    made = world(sizes, copy_bytes=ODD.slot_bytes)
    hold_copies(made.gpu)
    source, destination = ends
    made.mover.begin([move(n, n, (source, n), (destination, n)) for n in range(2)])
    until(lambda: not any(made.mover._links[ends]._waiting))  # as many as go at once
    priorities = [MovePriority(n) for n in (3, 1, 2, 0, 3, 1, 0, 2, 0)]
    for n, priority in enumerate(priorities, start=2):
        made.mover.begin([move(n, n, (source, n), (destination, n), priority)])
    let_go(made.gpu)
    order = [result.ticket for result in finish(made.mover, 2 + len(priorities))]
    expected = sorted(range(2, 11), key=lambda n: (priorities[n - 2], n))
    assert order == [0, 1, *expected]


@SIZES
def test_only_so_much_is_under_way(sizes, world: World) -> None:
    made = world(sizes, copy_bytes=2 * ODD.slot_bytes, num_in_flight=3)
    hold_copies(made.gpu)
    ends = (GPU, CPU)
    made.mover.begin([move(n, n, (GPU, n), (CPU, n)) for n in range(20)])
    time.sleep(0.05)
    waiting = sum(map(len, made.mover._links[ends]._waiting))
    num_parts = 3 if sizes is LARGE else sizes.num_buffers
    assert 20 - 2 * (num_parts + 1) <= waiting <= 20 - 2 * num_parts
    let_go(made.gpu)
    finish(made.mover, 20)


def test_large_blocks_are_one_call_and_small_ones_one_copy(world: World) -> None:
    for sizes, kinds in ((LARGE, {"to_host"}), (SMALL, {"gather", "to_host"})):
        made = world(sizes)
        del made.gpu.calls["register"]
        made.mover.begin([move(n, n, (GPU, n), (CPU, n)) for n in range(3)])
        finish(made.mover, 3)
        assert made.gpu.calls == dict.fromkeys(kinds, 1)


def test_slots_outside_are_a_bug(world: World) -> None:
    made = world(LARGE)
    made.mover.begin([move(1, 1, (GPU, SLOTS), (CPU, 0))])
    made.mover.wait(PATIENCE_S)
    with pytest.raises(IndexError, match=f"slot {SLOTS} of {SLOTS}"):
        made.mover.poll()
