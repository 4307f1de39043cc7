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

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from tierkv.cache.links import Link, Memory, copy_rows
from tierkv.cache.pools import GpuPool
from tierkv.cache.store_port import Answer, StorePort
from tierkv.errors import InvariantError
from tierkv.kernels import ops
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore
from tierkv.storage.quarantine import QuarantinedStore
from tierkv.types import Erasure, Move, MoveFailure, MoveResult, TierName

logger = logging.getLogger(__name__)

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME

_GRACE_S = 0.1  # for threads that waited for memory only

_Ends = tuple[TierName, TierName]
_Copy = Callable[[list[Move]], list[Answer]]
_Work = Callable[[list[Move]], None]


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
        _check(pool, arena, store)
        self._now, self._close_timeout_s = now, close_timeout_s
        self._slot_bytes = pool.layout.slot_bytes
        rows = pool.tensor.detach().view(torch.uint8).view(pool.num_blocks, pool.block_bytes)
        self._memory = {GPU: Memory(rows.numpy(), pool.block_bytes)}
        self._links: dict[_Ends, Link] = {}
        self._all_links: list[Link] = []
        self._threads: list[threading.Thread] = []
        self._results: list[MoveResult] = []
        self._released: dict[int, None] = {}
        self._erasures: list[Erasure] = []
        self._bug: BaseException | None = None
        self._news = threading.Condition()
        self._port: StorePort | None = None
        ops.get_backend()  # compiled now rather than by the first move
        if arena is not None:
            self._memory[CPU] = Memory.of(arena)
            self._connect("down", [(GPU, CPU)], copy_bytes, partial(self._execute, self._copy))
            self._connect("up", [(CPU, GPU)], copy_bytes, partial(self._execute, self._copy))
        if store is not None:
            self._port = StorePort(store, self._memory, self._slot_bytes, staging_bytes)
            self._connect_store(self._port, write_bytes, read_bytes, num_readers)
        for thread in self._threads:
            thread.start()

    def _connect_store(
        self, port: StorePort, write_bytes: int, read_bytes: int, num_readers: int
    ) -> None:
        self._writes = self._connect("write", [], write_bytes, partial(self._execute, port.write))
        down = [(tier, NVME) for tier in self._memory]
        most = min(write_bytes, port.num_staged * self._slot_bytes)
        self._connect("down", down, most, partial(self._stage, port), feeds=self._writes)
        reads = [partial(self._execute, port.reader(read_bytes)) for _ in range(num_readers)]
        self._connect("read", [(NVME, tier) for tier in self._memory], read_bytes, *reads)

    # ------------------------------------------------------------------ the engine's side

    def begin(self, moves: Sequence[Move]) -> None:
        groups: dict[Link, list[Move]] = {}
        for move in moves:
            link = self._links.get((move.source, move.destination))
            if link is None:
                raise InvariantError(f"no link {move.source.value} -> {move.destination.value}")
            groups.setdefault(link, []).append(move)
        if self._port is not None:
            self._port.expect([move for move in moves if move.source is NVME])
        for link, group in groups.items():
            if not link.try_put(group):
                raise InvariantError("the mover is closed")

    def poll(self) -> list[MoveResult]:
        with self._news:
            if self._bug is not None:
                raise self._bug
            results, self._results = self._results, []
            for result in results:
                self._released.pop(result.ticket, None)
        return results

    def poll_released(self) -> list[int]:
        with self._news:
            released, self._released = list(self._released), {}
        return released

    def poll_erased(self) -> list[Erasure]:
        with self._news:
            erasures, self._erasures = self._erasures, []
        return erasures

    def abandon(self, tickets: Sequence[int]) -> None:
        if self._port is not None:
            self._release(self._port.claim(tickets))

    def wait(self, timeout_s: float) -> None:
        limit_s = min(timeout_s, threading.TIMEOUT_MAX)
        with self._news:
            self._news.wait_for(self._has_news, limit_s)

    def _has_news(self) -> bool:
        return bool(self._results or self._released or self._erasures or self._bug)

    def erase(self, slots: Sequence[int]) -> None:
        self._need_port()
        if not self._writes.try_put((), slots):
            raise InvariantError("the mover is closed")

    def touch(self, slots: Sequence[int]) -> None:
        self._need_port().store.touch(slots)

    def is_quarantined(self, *, is_read: bool) -> bool:
        store = self._port.store if self._port is not None else None
        if not isinstance(store, QuarantinedStore):
            return False
        return (store.reads if is_read else store.writes).is_quarantined

    def _need_port(self) -> StorePort:
        if self._port is None:
            raise InvariantError("there is no store")
        return self._port

    def close(self) -> None:
        for link in self._links.values():
            link.close()  # the one that is fed closes when its feeder has ended
        if self._join(self._close_timeout_s):
            logger.warning("moves are stuck after %g s and left behind", self._close_timeout_s)
            if self._port is not None:
                self._port.close()
                self._join(_GRACE_S)
        for link in self._all_links:
            erased, left = link.drain()
            self._report(left, [MoveFailure.UNAVAILABLE] * len(left), 0.0)
            self._report_erased([Erasure(slot, MoveFailure.UNAVAILABLE) for slot in erased])

    def _join(self, timeout_s: float) -> bool:
        """Wait for the threads; whether some have not ended."""
        deadline_s = time.monotonic() + timeout_s
        # A collection of garbage may close an engine on any thread, also on one of these.
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return any(thread.is_alive() for thread in others)

    # ------------------------------------------------------------------ the threads' side

    def _connect(
        self,
        name: str,
        ends: list[_Ends],
        batch_bytes: int,
        *work: _Work,
        feeds: Link | None = None,
    ) -> Link:
        """A link with one thread for each `work`; those of `ends` are served together."""
        link = Link(max(1, batch_bytes // self._slot_bytes))
        self._links |= dict.fromkeys(ends, link)
        self._all_links.append(link)
        for part in work:
            name_of = f"tierkv-{name}-{len(self._threads)}"
            thread = threading.Thread(
                target=self._serve, args=(link, part, feeds), name=name_of, daemon=True
            )
            self._threads.append(thread)
        return link

    def _serve(self, link: Link, work: _Work, feeds: Link | None) -> None:
        """Work until the link is closed; a bug ends it and is raised by `poll`."""
        try:
            while True:
                erased, moves = link.take()
                if erased:
                    self._report_erased(self._need_port().erase(erased))
                if moves:
                    work(moves)
                elif not erased:
                    return
        except BaseException as error:
            with self._news:
                self._bug = self._bug or error
                self._news.notify_all()
        finally:
            if feeds is not None:
                feeds.close()

    def _execute(self, copy: _Copy, moves: list[Move]) -> None:
        """Copy, and report how it went."""
        start = self._now()
        try:
            answers = copy(moves)
        except OSError as error:
            logger.warning("%d moves failed: %s", len(moves), error)
            answers = [MoveFailure.IO_ERROR] * len(moves)
        self._report(moves, answers, self._now() - start)

    def _report(self, moves: list[Move], answers: list[Answer], seconds: float) -> None:
        share = seconds / max(1, len(moves))
        results = [MoveResult(m.ticket, a, share) for m, a in zip(moves, answers, strict=True)]
        with self._news:
            self._results += results
            self._news.notify_all()

    def _copy(self, moves: list[Move]) -> list[Answer]:
        source, destination = self._memory[moves[0].source], self._memory[moves[0].destination]
        froms, tos = [m.source_slot for m in moves], [m.destination_slot for m in moves]
        copy_rows(source, froms, destination, tos)
        return [None] * len(moves)

    def _stage(self, port: StorePort, moves: list[Move]) -> None:
        """Release what comes from the pool, and queue all for the writer."""
        released = port.stage(moves)
        self._release(released or [])
        if released is None or not self._writes.try_put(moves):
            self._report(moves, [MoveFailure.UNAVAILABLE] * len(moves), 0.0)

    def _release(self, tickets: list[int]) -> None:
        with self._news:
            self._released |= dict.fromkeys(tickets)
            self._news.notify_all()

    def _report_erased(self, erasures: list[Erasure]) -> None:
        with self._news:
            self._erasures += erasures
            self._news.notify_all()


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
