"""The mover for a pool on a GPU: streams copy between pool and host memory, threads do the rest.

    link                   threads   streams
    pool -> arena          1         1
    arena -> pool          1         1
    pool, arena -> store   2         1 (pool -> staging memory; then as in `ThreadMover`)
    store -> pool, arena   2         1 each (staging memory -> pool)

A thread takes the most urgent moves of its link, issues their copies and sleeps until they are
done. A stream does its work in order, so only a few copies are under way at once and what is more
urgent waits for those alone; the next ones are issued before the last are done, so that the link
is not idle in between. The engine's thread records one event when moves begin and never waits.

What may overtake what:

    the forward that wrote a block          before its copy down    event at `begin`
    the last forward that read a slot       before a copy into it   event at `begin`
    a copy out of a slot of the pool        before the slot is used again: it is reported, and
                                            released, once its event has happened
    a copy into the pool                    before the forward that reads it: the engine uses
                                            blocks whose results it polled, and the event of these
                                            has happened
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from tierkv.cache.cuda.lanes import DownLane, Lane, LaneSizes, Marks, Part, Transfer, UpLane
from tierkv.cache.cuda.registered import PIECE_BYTES, RegisteredMemory
from tierkv.cache.cuda.streams import Device
from tierkv.cache.cuda.torch_device import TorchDevice
from tierkv.cache.link_mover import LinkMover, Loop, check_sizes
from tierkv.cache.links import Link, Memory
from tierkv.cache.pools import GpuPool
from tierkv.cache.store_port import StorePort
from tierkv.errors import InvariantError
from tierkv.kernels import ops
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore
from tierkv.types import Move, MoveResult, TierName

GPU, CPU = TierName.GPU, TierName.CPU

_UNREGISTER_S = 5.0  # for a registration that is under way when the mover closes

_left_behind: list[RegisteredMemory | Lane] = []
"""Memory that a copy may still use: it is kept until the process ends."""


class CudaMover(LinkMover):
    """A `Mover` for a pool on a GPU. Not yet run on a GPU.

    It owns its threads, its streams and the registration of the arena, not pool, arena and store.
    Whatever the device refuses is raised by `poll`, as a `DeviceError`.

    Args:
        pool, arena, store: the tiers, as in `ThreadMover`.
        device: of the pool; None for the real one.
        copy_bytes: most bytes of a batch between pool and arena.
        num_in_flight: batches under way at once on each of these two links.
        write_bytes, read_bytes, staging_bytes, num_readers, close_timeout_s, now: as there; the
            staging memory is registered at once.
        sizes: which blocks are gathered, and through what.
        piece_bytes: of the arena, registered at once.

    Raises:
        InvariantError: sizes that do not fit.
        ConfigError: the system has no page-locked memory, not even for buffers.
    """

    def __init__(
        self,
        pool: GpuPool,
        arena: HostArena | None = None,
        store: BlockStore | None = None,
        *,
        device: Device | None = None,
        copy_bytes: int = 16 << 20,
        num_in_flight: int = 2,
        write_bytes: int = 32 << 20,
        read_bytes: int = 16 << 20,
        staging_bytes: int = 128 << 20,
        num_readers: int = 2,
        close_timeout_s: float = 5.0,
        now: Callable[[], float] = time.perf_counter,
        sizes: LaneSizes | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        if not pool.tensor.is_contiguous() or (device is None and pool.device.type != "cuda"):
            raise InvariantError(f"a pool on {pool.device} needs another mover")
        check_sizes(pool, arena, store)
        super().__init__(pool.layout.slot_bytes, close_timeout_s, now)
        self._device = device if device is not None else TorchDevice(pool.device)
        self._pool = pool.tensor.detach().view(torch.uint8).view(pool.num_blocks, pool.block_bytes)
        self._sizes, self._num_in_flight = sizes or LaneSizes(), num_in_flight
        self._piece_bytes = piece_bytes
        self._marks: Marks = {}
        self._lanes: list[Lane] = []
        self._registered: list[RegisteredMemory] = []
        self._memory: dict[TierName, Memory] = {}
        ops.get_backend()  # compiled now rather than by the first move
        try:
            if arena is not None:
                self._connect_arena(arena, copy_bytes)
            if store is not None:
                copies = [self._lane(UpLane).copy for _ in range(num_readers)]
                port = self._make_port(store, staging_bytes)
                tiers = [GPU, *self._memory]
                self._connect_store(port, tiers, write_bytes, read_bytes, copies)
        except BaseException:
            self._unregister()
            raise
        if arena is not None:
            self._register(self._arena)  # last: it may take all that can be had
        self._start()

    def _connect_arena(self, arena: HostArena, copy_bytes: int) -> None:
        self._arena = RegisteredMemory(self._device, arena, "the CPU tier", self._piece_bytes)
        self._memory[CPU] = self._arena
        self._connect("down", [(GPU, CPU)], copy_bytes, self._copies(DownLane))
        self._connect("up", [(CPU, GPU)], copy_bytes, self._copies(UpLane))

    def _make_port(self, store: BlockStore, staging_bytes: int) -> StorePort:
        sizes = self._slot_bytes, self._pool.shape[1], staging_bytes
        read = self._lane(DownLane).copy
        return StorePort(store, self._memory, *sizes, read, self._allocate)

    def _copies(self, kind: type[Lane]) -> Loop:
        return partial(self._stream, self._lane(kind))

    def _lane(self, kind: type[Lane]) -> Lane:
        self._lanes.append(kind(self._device, self._pool, self._marks, self._sizes))
        return self._lanes[-1]

    def _allocate(self, num_slots: int, block_bytes: int) -> RegisteredMemory:
        arena = HostArena(num_slots, block_bytes)
        memory = RegisteredMemory(self._device, arena, "staging memory", self._piece_bytes)
        self._register(memory)
        memory.wait()
        return memory

    def _register(self, memory: RegisteredMemory) -> None:
        self._registered.append(memory)
        memory.start()

    # ------------------------------------------------------------------ the engine's side

    def begin(self, moves: Sequence[Move]) -> None:
        if any(GPU in (move.source, move.destination) for move in moves):
            event = self._device.record(self._device.compute_stream())
            self._marks.update((move.ticket, event) for move in moves)
        super().begin(moves)

    def poll(self) -> list[MoveResult]:
        results = super().poll()
        for result in results:
            self._marks.pop(result.ticket, None)
        return results

    def warm_up(self, timeout_s: float) -> None:
        for memory in self._registered:
            memory.wait(timeout_s)

    def close(self) -> None:
        super().close()
        if self._join(0.0):
            _left_behind.extend([*self._lanes, *self._registered])
            self._lanes, self._registered = [], []
        self._unregister()

    def _unregister(self) -> None:
        """Give all registered memory back; no copy is under way."""
        for lane in self._lanes:
            lane.close()
        for memory in self._registered:
            memory.close(_UNREGISTER_S)
        self._lanes, self._registered = [], []

    # ------------------------------------------------------------------ the threads' side

    def _stream(self, lane: Lane, link: Link) -> None:
        """Issue what waits, the most urgent first, and report what is done."""
        waiting: deque[Part] = deque()
        running: deque[Transfer] = deque()
        while True:
            if not waiting:
                moves = link.take_now() if running else link.take()[1]
                waiting.extend(lane.parts(moves, self._arena, self._arena_slots(moves)))
            if not waiting and not running:
                return
            has_room = len(running) < self._num_in_flight
            if waiting and has_room and lane.can_start(waiting[0]):
                running.append(lane.start(waiting.popleft()))
            else:
                ended = running.popleft()
                seconds = lane.finish(ended)
                self._report(ended.part.moves, [None] * len(ended.part.moves), seconds)

    def _arena_slots(self, moves: list[Move]) -> list[int]:
        return [m.destination_slot if m.source is GPU else m.source_slot for m in moves]
