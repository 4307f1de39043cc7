"""What movers with threads share: the engine's side, links with their threads, and the end.

Each link has a queue and a thread that takes the most urgent moves of one priority at a time. A
subclass says what serves a link; results, releases and erasures are collected here until the
engine's thread polls them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from tierkv.cache.links import Link
from tierkv.cache.pools import GpuPool
from tierkv.cache.store_port import Answer, CopyPool, StorePort
from tierkv.errors import InvariantError
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore
from tierkv.storage.quarantine import QuarantinedStore
from tierkv.types import Erasure, Move, MoveFailure, MoveResult, TierName

logger = logging.getLogger(__name__)

NVME = TierName.NVME

_GRACE_S = 0.1  # for threads that waited for memory only

Ends = tuple[TierName, TierName]
Copy = Callable[[list[Move]], list[Answer]]
Work = Callable[[list[Move]], None]
Loop = Callable[[Link], None]
"""Serves a link until it is closed and empty."""


class LinkMover:
    """A `Mover` without its links; see `ThreadMover` for what the options mean.

    Args:
        slot_bytes: of a block with its padding.
        close_timeout_s: how long `close` waits for the moves that have begun.
        now: a clock in seconds, for results.
    """

    def __init__(
        self, slot_bytes: int, close_timeout_s: float, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._now, self._close_timeout_s = now, close_timeout_s
        self._slot_bytes = slot_bytes
        self._links: dict[Ends, Link] = {}
        self._all_links: list[Link] = []
        self._threads: list[threading.Thread] = []
        self._results: list[MoveResult] = []
        self._released: dict[int, None] = {}
        self._erasures: list[Erasure] = []
        self._bug: BaseException | None = None
        self._news = threading.Condition()
        self._port: StorePort | None = None

    def _connect_store(
        self,
        port: StorePort,
        tiers: Sequence[TierName],
        write_bytes: int,
        read_bytes: int,
        write_pool: Sequence[CopyPool],
    ) -> None:
        """The links of the store with the tiers in memory; one reader for each of `write_pool`."""
        self._port = port
        write = partial(self._one_by_one, partial(self._execute, port.write))
        self._writes = self._connect("write", [], write_bytes, write)
        most = min(write_bytes, port.num_staged * self._slot_bytes)
        stage = partial(self._one_by_one, partial(self._stage, port))
        down = [(tier, NVME) for tier in tiers]
        self._connect("down", down, most, stage, feeds=self._writes)
        readers = [partial(self._execute, port.reader(read_bytes, copy)) for copy in write_pool]
        reads = [partial(self._one_by_one, read) for read in readers]
        self._connect("read", [(NVME, tier) for tier in tiers], read_bytes, *reads)

    def _start(self) -> None:
        for thread in self._threads:
            thread.start()

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

    def warm_up(self, timeout_s: float) -> None:
        """Return when moves are as fast as they will be, after at most that long."""

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
        ends: list[Ends],
        batch_bytes: int,
        *loops: Loop,
        feeds: Link | None = None,
    ) -> Link:
        """A link with one thread for each loop; those of `ends` are served together."""
        link = Link(max(1, batch_bytes // self._slot_bytes))
        self._links |= dict.fromkeys(ends, link)
        self._all_links.append(link)
        for loop in loops:
            name_of = f"tierkv-{name}-{len(self._threads)}"
            thread = threading.Thread(
                target=self._serve, args=(link, loop, feeds), name=name_of, daemon=True
            )
            self._threads.append(thread)
        return link

    def _serve(self, link: Link, loop: Loop, feeds: Link | None) -> None:
        """Work until the link is closed; a bug ends it and is raised by `poll`."""
        try:
            loop(link)
        except BaseException as error:
            with self._news:
                self._bug = self._bug or error
                self._news.notify_all()
        finally:
            if feeds is not None:
                feeds.close()

    def _one_by_one(self, work: Work, link: Link) -> None:
        """Take a batch, work on it, take the next."""
        while True:
            erased, moves = link.take()
            if erased:
                self._report_erased(self._need_port().erase(erased))
            if moves:
                work(moves)
            elif not erased:
                return

    def _execute(self, copy: Copy, moves: list[Move]) -> None:
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


def check_sizes(pool: GpuPool, arena: HostArena | None, store: BlockStore | None) -> None:
    """Raise InvariantError unless the tiers' slots have the same size."""
    if arena is not None and arena.block_bytes != pool.block_bytes:
        sizes = f"{arena.block_bytes} bytes, the pool's {pool.block_bytes}"
        raise InvariantError(f"the arena's blocks have {sizes}")
    if store is not None and store.slot_payload_bytes != pool.layout.slot_bytes:
        sizes = f"{store.slot_payload_bytes} bytes, the layout's {pool.layout.slot_bytes}"
        raise InvariantError(f"the store's slots have {sizes}")
