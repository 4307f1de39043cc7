"""The mover on the CPU: threads that copy blocks between pool, arena and store.

    link                   threads
    pool -> arena          1
    arena -> pool          1
    pool, arena -> store   1 that stages, then 1 that writes: a parent's write ends before or with
                           its child's
    store -> pool, arena   2

Per link the most urgent moves wait in front. A thread takes as many of one priority as its batch
may have bytes, and executes them as one call, which holds no interpreter lock: any number of
copies in memory, or one `write` or `read` of the store.

A disk that takes long, or never answers, keeps no block of the pool: what goes from the pool to the
store is copied to staging memory first, and its place in the pool is *released*; what comes from
the store is copied into the pool when it is complete, and can be abandoned until then. Nobody
changes staging memory before the call that uses it has returned, so checksums are those of whole
blocks. Between arena and store blocks move in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from tierkv.cache.link_mover import Ends, LinkMover, check_sizes
from tierkv.cache.links import Memory, copy_rows
from tierkv.cache.pools import GpuPool
from tierkv.cache.store_port import Answer, StorePort
from tierkv.errors import InvariantError
from tierkv.kernels import ops
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore
from tierkv.types import Move, TierName

GPU, CPU = TierName.GPU, TierName.CPU


class ThreadMover(LinkMover):
    """A `Mover` for a pool in the CPU's memory.

    It owns its threads only; whoever made pool, arena and store closes them, after this one.
    Erasures go before all writes that wait: no move of an erased slot may be in flight.

    Args:
        pool: the GPU tier.
        arena: the CPU tier, if there is one; blocks of the pool's size.
        store: the NVMe tier, if there is one; slots of the layout's `slot_bytes`.
        copy_bytes, write_bytes, read_bytes: most bytes of a batch between memories, to the store
            and from it.
        staging_bytes: of blocks that have left the pool and are not written yet. A move from the
            pool that finds no room there keeps its source, so `MoveLimits.link_bytes` is no more.
        num_readers: threads that read from the store.
        close_timeout_s: how long `close` waits for the moves that have begun; what has not ended
            then is UNAVAILABLE.
        now: a clock in seconds, for results.

    Raises:
        InvariantError: sizes that do not fit, or a pool that is not on the CPU.
    """

    def __init__(
        self,
        pool: GpuPool,
        arena: HostArena | None = None,
        store: BlockStore | None = None,
        *,
        copy_bytes: int = 16 << 20,
        write_bytes: int = 32 << 20,
        read_bytes: int = 16 << 20,
        staging_bytes: int = 128 << 20,
        num_readers: int = 2,
        close_timeout_s: float = 5.0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if pool.device.type != "cpu" or not pool.tensor.is_contiguous():
            raise InvariantError(f"a pool on {pool.device} needs another mover")
        check_sizes(pool, arena, store)
        super().__init__(pool.layout.slot_bytes, close_timeout_s, now)
        rows = pool.tensor.detach().view(torch.uint8).view(pool.num_blocks, pool.block_bytes)
        self._pool = Memory(rows.numpy(), pool.block_bytes)
        self._memory: dict[TierName, Memory] = {}
        ops.get_backend()  # compiled now rather than by the first move
        if arena is not None:
            self._memory[CPU] = Memory.of(arena)
            self._connect_copies("down", (GPU, CPU), copy_bytes)
            self._connect_copies("up", (CPU, GPU), copy_bytes)
        if store is not None:
            sizes = self._slot_bytes, pool.block_bytes, staging_bytes
            port = StorePort(store, self._memory, *sizes, self._read_pool)
            readers = [self._write_pool] * num_readers
            self._connect_store(port, [GPU, *self._memory], write_bytes, read_bytes, readers)
        self._start()

    def _connect_copies(self, name: str, ends: Ends, batch_bytes: int) -> None:
        copy = partial(self._execute, self._copy)
        self._connect(name, [ends], batch_bytes, partial(self._one_by_one, copy))

    def _copy(self, moves: list[Move]) -> list[Answer]:
        if moves[0].source is GPU:
            self._read_pool(moves, self._memory[CPU], [move.destination_slot for move in moves])
        else:
            self._write_pool(moves, self._memory[CPU], [move.source_slot for move in moves])
        return [None] * len(moves)

    def _read_pool(self, moves: list[Move], memory: Memory, slots: list[int]) -> None:
        copy_rows(self._pool, [move.source_slot for move in moves], memory, slots)

    def _write_pool(self, moves: list[Move], memory: Memory, slots: list[int]) -> None:
        copy_rows(memory, slots, self._pool, [move.destination_slot for move in moves])
