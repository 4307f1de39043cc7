"""The mover on the CPU: threads that copy blocks between pool, arena and store.

    link                   threads
    pool -> arena          1
    arena -> pool          1
    pool, arena -> store   1, so that a parent's write ends before or with its child's
    store -> pool, arena   2

Per link the most urgent moves wait in front. A thread takes as many of one priority as its batch
may have bytes, and executes them as one call, which holds no interpreter lock: any number of
copies in memory, or one `write` or `read` of the store. Blocks go between memory and store in
place; where a block of the pool is shorter than the store's slot they are staged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tierkv.cache.pools import GpuPool
from tierkv.errors import InvariantError
from tierkv.kernels import ops
from tierkv.storage import base
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore, Cause, Outcome
from tierkv.types import Move, MoveFailure, MovePriority, MoveResult, TierName

logger = logging.getLogger(__name__)

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME

_FAILURES = {
    Cause.NOT_FOUND: MoveFailure.LOST,
    Cause.SHORT_READ: MoveFailure.LOST,
    Cause.CORRUPT: MoveFailure.CORRUPT,
    Cause.IO_ERROR: MoveFailure.IO_ERROR,
    Cause.NO_SPACE: MoveFailure.NO_SPACE,
    Cause.LATE: MoveFailure.LATE,
    Cause.CLOSED: MoveFailure.UNAVAILABLE,
    Cause.QUARANTINED: MoveFailure.UNAVAILABLE,
}
_NO_PARENT = bytes(base.KEY_BYTES)

_Answer = MoveFailure | None
_Ends = tuple[TierName, TierName]
_Place = tuple[TierName, int]
_Work = Callable[[list[Move]], list[_Answer]]


class _Memory:
    """A tier in memory.

    Attributes:
        rows: uint8 `[num_slots, block_bytes]`, the blocks.
        slots: uint8 `[num_slots, stride]`, with their padding.
    """

    def __init__(self, slots: np.ndarray[Any, np.dtype[np.uint8]], block_bytes: int) -> None:
        self.slots = slots
        self.rows = torch.from_numpy(slots)[:, :block_bytes]

    def view(self, slot: int) -> memoryview:
        """The slot's bytes, with its padding."""
        return memoryview(self.slots[slot])


def _copy_rows(source: _Memory, froms: list[int], destination: _Memory, tos: list[int]) -> None:
    if froms:
        ids = torch.tensor([froms, tos])
        ops.copy_rows(source.rows, ids[0], destination.rows, ids[1])


class _Link:
    """Moves and erasures that wait for the same threads.

    Args:
        batch_moves: how many moves a thread takes at once.
    """

    def __init__(self, batch_moves: int) -> None:
        self._batch_moves = batch_moves
        self._waiting: list[deque[Move]] = [deque() for _ in MovePriority]
        self._erased: list[int] = []
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, moves: Sequence[Move], erased: Sequence[int] = ()) -> None:
        with self._changed:
            if self._is_closed:
                raise InvariantError("the mover is closed")
            for move in moves:
                self._waiting[move.priority].append(move)
            self._erased.extend(erased)
            self._changed.notify_all()

    def take(self) -> tuple[list[int], list[Move]]:
        """Wait for slots to erase and the most urgent moves, all of one priority; nothing of
        either once the link is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._erased or any(self._waiting))
            erased, self._erased = self._erased, []
            queue = next(filter(None, self._waiting), None) or deque[Move]()
            return erased, [queue.popleft() for _ in range(min(len(queue), self._batch_moves))]

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def drain(self) -> list[Move]:
        """What no thread took."""
        with self._changed:
            left = [move for queue in self._waiting for move in queue]
            self._waiting = [deque() for _ in MovePriority]
            return left


class ThreadMover:
    """A `Mover` for a pool in the CPU's memory.

    It owns its threads only; whoever made pool, arena and store closes them, after this one.
    Erasures go before all writes that wait: no move of an erased slot may be in flight.

    Args:
        pool: the GPU tier.
        arena: the CPU tier, if there is one; blocks of the pool's size.
        store: the NVMe tier, if there is one; slots of the layout's `slot_bytes`.
        copy_bytes, write_bytes, read_bytes: most bytes of a batch between memories, to the store
            and from it.
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
        num_readers: int = 2,
        close_timeout_s: float = 5.0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        _check(pool, arena, store)
        self._now, self._close_timeout_s = now, close_timeout_s
        self._slot_bytes = pool.layout.slot_bytes
        self._is_staged = pool.block_bytes != self._slot_bytes
        rows = pool.tensor.detach().view(torch.uint8).view(pool.num_blocks, pool.block_bytes)
        self._memory = {GPU: _Memory(rows.numpy(), pool.block_bytes)}
        self._links: dict[_Ends, _Link] = {}
        self._threads: list[threading.Thread] = []
        self._results: list[MoveResult] = []
        self._bug: BaseException | None = None
        self._ended = threading.Condition()
        ops.get_backend()  # compiled now rather than by the first move
        if arena is not None:
            self._memory[CPU] = _Memory(arena.array, arena.block_bytes)
            self._connect("down", [(GPU, CPU)], copy_bytes, self._copy)
            self._connect("up", [(CPU, GPU)], copy_bytes, self._copy)
        if store is not None:
            self._store = store
            write = partial(self._write, self._staging(write_bytes))
            read = [partial(self._read, self._staging(read_bytes)) for _ in range(num_readers)]
            self._connect("write", [(tier, NVME) for tier in self._memory], write_bytes, write)
            self._connect("read", [(NVME, tier) for tier in self._memory], read_bytes, *read)
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ the engine's side

    def begin(self, moves: Sequence[Move]) -> None:
        groups: dict[_Link, list[Move]] = {}
        for move in moves:
            link = self._links.get((move.source, move.destination))
            if link is None:
                raise InvariantError(f"no link {move.source.value} -> {move.destination.value}")
            groups.setdefault(link, []).append(move)
        for link, group in groups.items():
            link.put(group)

    def poll(self) -> list[MoveResult]:
        with self._ended:
            if self._bug is not None:
                raise self._bug
            results, self._results = self._results, []
        return results

    def wait(self, timeout_s: float) -> None:
        limit_s = min(timeout_s, threading.TIMEOUT_MAX)
        with self._ended:
            self._ended.wait_for(lambda: self._results or self._bug, limit_s)

    def erase(self, slots: Sequence[int]) -> None:
        link = self._links.get((GPU, NVME))
        if link is None:
            raise InvariantError("there is no store to erase from")
        link.put((), slots)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        deadline_s = time.monotonic() + self._close_timeout_s
        # A collection of garbage may close an engine on any thread, also on one of these.
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if any(thread.is_alive() for thread in others):
            logger.warning("moves are stuck after %g s and left behind", self._close_timeout_s)
        for link in self._links.values():
            left = link.drain()
            self._report(left, [MoveFailure.UNAVAILABLE] * len(left), 0.0)

    # ------------------------------------------------------------------ the threads' side

    def _connect(self, name: str, links: list[_Ends], batch_bytes: int, *work: _Work) -> None:
        """One thread for each `work`, which serve `links` together."""
        link = _Link(max(1, batch_bytes // self._slot_bytes))
        self._links |= dict.fromkeys(links, link)
        for part in work:
            name_of = f"tierkv-{name}-{len(self._threads)}"
            thread = threading.Thread(
                target=self._serve, args=(link, part), name=name_of, daemon=True
            )
            self._threads.append(thread)

    def _serve(self, link: _Link, work: _Work) -> None:
        """Execute batches until the link is closed; a bug ends it and is raised by `poll`."""
        try:
            while True:
                erased, moves = link.take()
                if not erased and not moves:
                    return
                start = self._now()
                try:
                    if erased:
                        self._store.erase(list(dict.fromkeys(erased)))
                    answers = work(moves) if moves else []
                except OSError as error:
                    logger.warning("%d moves failed: %s", len(moves), error)
                    answers = [MoveFailure.IO_ERROR] * len(moves)
                self._report(moves, answers, self._now() - start)
        except BaseException as error:
            with self._ended:
                self._bug = self._bug or error
                self._ended.notify_all()

    def _report(self, moves: list[Move], answers: list[_Answer], seconds: float) -> None:
        share = seconds / max(1, len(moves))
        results = [MoveResult(m.ticket, a, share) for m, a in zip(moves, answers, strict=True)]
        with self._ended:
            self._results += results
            self._ended.notify_all()

    def _copy(self, moves: list[Move]) -> list[_Answer]:
        source, destination = self._memory[moves[0].source], self._memory[moves[0].destination]
        froms, tos = [m.source_slot for m in moves], [m.destination_slot for m in moves]
        _copy_rows(source, froms, destination, tos)
        return [None] * len(moves)

    def _staging(self, batch_bytes: int) -> _Memory:
        """Memory for one thread's batch; it takes pages only where it is used."""
        count = max(1, batch_bytes // self._slot_bytes)
        arena = HostArena(count, self._memory[GPU].rows.shape[1])
        return _Memory(arena.array, arena.block_bytes)

    def _buffers(
        self, places: list[_Place], staging: _Memory
    ) -> tuple[list[memoryview], list[int]]:
        """What the store reads or writes for each move, and which of them are staged."""
        staged = [i for i, (tier, _) in enumerate(places) if tier is GPU and self._is_staged]
        views = [self._memory[tier].view(slot) for tier, slot in places]
        for i in staged:
            views[i] = staging.view(i)
        return views, staged

    def _write(self, staging: _Memory, moves: list[Move]) -> list[_Answer]:
        views, staged = self._buffers([(m.source, m.source_slot) for m in moves], staging)
        _copy_rows(self._memory[GPU], [moves[i].source_slot for i in staged], staging, staged)
        writes = [
            base.SlotWrite(m.destination_slot, m.key, m.parent or _NO_PARENT, m.tokens, view)
            for m, view in zip(moves, views, strict=True)
        ]
        return [_answer(outcome) for outcome in self._store.write(writes)]

    def _read(self, staging: _Memory, moves: list[Move]) -> list[_Answer]:
        answers: dict[int, _Answer] = {}
        for batch in _distinct(moves):
            places = [(m.destination, m.destination_slot) for m in batch]
            views, staged = self._buffers(places, staging)
            reads = [
                base.SlotRead(m.source_slot, m.key, v) for m, v in zip(batch, views, strict=True)
            ]
            outcomes = self._store.read(reads)
            arrived = [i for i in staged if not isinstance(outcomes[i], base.Failure)]
            slots = [batch[i].destination_slot for i in arrived]
            _copy_rows(staging, arrived, self._memory[GPU], slots)
            answers |= {m.ticket: _answer(o) for m, o in zip(batch, outcomes, strict=True)}
        return [answers[move.ticket] for move in moves]


def _distinct(moves: list[Move]) -> Iterator[list[Move]]:
    """The moves in parts that name no slot twice: two tiers may want one block."""
    while moves:
        first: dict[int, Move] = {}
        rest = [move for move in moves if first.setdefault(move.source_slot, move) is not move]
        yield list(first.values())
        moves = rest


def _answer(outcome: Outcome) -> _Answer:
    return _FAILURES[outcome.cause] if isinstance(outcome, base.Failure) else None


def _check(pool: GpuPool, arena: HostArena | None, store: BlockStore | None) -> None:
    """Raise InvariantError unless the tiers' slots have the same size."""
    if pool.device.type != "cpu" or not pool.tensor.is_contiguous():
        raise InvariantError(f"a pool on {pool.device} needs another mover")
    if arena is not None and arena.block_bytes != pool.block_bytes:
        sizes = f"{arena.block_bytes} bytes, the pool's {pool.block_bytes}"
        raise InvariantError(f"the arena's blocks have {sizes}")
    if store is not None and store.slot_payload_bytes != pool.layout.slot_bytes:
        sizes = f"{store.slot_payload_bytes} bytes, the layout's {pool.layout.slot_bytes}"
        raise InvariantError(f"the store's slots have {sizes}")
