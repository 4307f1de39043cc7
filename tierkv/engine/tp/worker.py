"""A worker: a part of the model with its own pool and tiers, that does what rank 0 says.

One thread reads commands and carries them out in order, so a move begins after the step before it
and before the step behind it, as on rank 0. While blocks move it looks at its mover between two
commands and reports what ended. A command that fails ends the worker; rank 0 gets the reason.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from transformers.utils import logging as transformers_logging

from tierkv.cache.block_port import TierPort
from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool
from tierkv.config import EngineConfig
from tierkv.engine.build import pool_blocks
from tierkv.engine.calibrate import measure_compute
from tierkv.engine.core import LowerTierSetup
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.tiers import open_tiers
from tierkv.engine.tp import ranks
from tierkv.engine.tp.common import describe, erase_stored
from tierkv.engine.tp.steps import StepDecoder
from tierkv.errors import ConfigError, EngineDeadError, InvariantError
from tierkv.model.device import choose_device
from tierkv.model.loaded import LoadedModel
from tierkv.model.loader import load_model
from tierkv.model.runner import ModelRunner
from tierkv.model.shard import Shard
from tierkv.types import BlockKey, Move, TierName

logger = logging.getLogger(__name__)

_LOOK_S = 0.0005  # between two looks at the mover while blocks move
_PARENT_S = 1.0


class RankWorker:
    """One rank's model, pool and tiers.

    Args:
        shard: which rank.
        connection: commands come from it, answers and reports go to it.
    """

    def __init__(self, shard: Shard, connection: Connection) -> None:
        self._shard, self._connection = shard, connection
        self._send_lock = threading.Lock()
        self._decoder = StepDecoder()
        self._config: EngineConfig
        self._loaded: LoadedModel
        self._layout: KVLayout
        self._pool: GpuPool
        self._runner: ModelRunner
        self._cost = MeasuredCost(1)
        self._port: TierPort
        self._tiers: LowerTierSetup | None = None
        self._moving: set[int] = set()
        self._erasing: set[int] = set()
        self._quarantined = (False, False)

    def run(self) -> None:
        """Until rank 0 says `exit`, or has ended."""
        while True:
            is_busy = bool(self._moving or self._erasing)
            if self._connection.poll(_LOOK_S if is_busy else None):
                kind, values = self._connection.recv()
                if kind == "exit":
                    return
                handler: Callable[..., None] = getattr(self, f"do_{kind}")
                handler(*values)
            self._report()

    def _send(self, kind: str, *values: Any) -> None:
        with self._send_lock:
            self._connection.send((kind, values))

    # ------------------------------------------------------------------ start

    def do_start(self, config: EngineConfig, port: int) -> None:
        """Find the other ranks."""
        self._config = config
        store = ranks.find_store(port, self._shard.size)
        self._send("reply", True)
        ranks.join(store, self._shard, choose_device(config.device).type)
        ranks.share_threads(config)

    def do_load(self) -> None:
        """Load this rank's part; answers how many blocks its memory allows."""
        self._loaded = load_model(self._config, self._shard)
        self._layout = self._loaded.layout(self._config.block_size)
        self._send("reply", pool_blocks(self._config, self._loaded))

    def do_pool(self, num_blocks: int) -> None:
        """Make the pool."""
        self._pool = GpuPool(self._layout, num_blocks, self._loaded.device)
        self._runner = ModelRunner(self._loaded, self._pool)
        self._port = TierPort(self._pool)

    def do_calibrate(self) -> None:
        """Compute what rank 0 measures; both must, because each needs the other's part."""
        self._cost = measure_compute(self._loaded, self._layout)

    def do_open_tiers(self) -> None:
        """Open the tiers; answers their sizes and what is stored."""
        loaded = self._loaded
        tiers = open_tiers(self._config, self._layout, loaded.fingerprint, self._pool, self._cost)
        self._tiers = tiers
        if tiers is not None:
            self._port = TierPort(self._pool, tiers.arena, tiers.store)
        self._send("reply", describe(tiers))

    def do_forget_stored(self, slots: list[int]) -> None:
        """Erase stored blocks that other ranks do not have."""
        erase_stored(self._tiers, slots)

    # ------------------------------------------------------------------ steps

    def do_step(self, payload: bytes) -> None:
        plan, forgotten = self._decoder.decode(payload)
        for seq_id in forgotten:
            self._runner.forget(seq_id)
        self._runner.run(plan)

    # ------------------------------------------------------------------ moves

    def _need_tiers(self) -> LowerTierSetup:
        if self._tiers is None:
            raise InvariantError(f"rank {self._shard} has one tier only")
        return self._tiers

    def do_begin(self, moves: Sequence[Move]) -> None:
        self._moving |= {move.ticket for move in moves}
        self._need_tiers().mover.begin(moves)

    def do_abandon(self, tickets: Sequence[int]) -> None:
        self._need_tiers().mover.abandon(tickets)

    def do_erase(self, slots: Sequence[int]) -> None:
        self._erasing |= set(slots)
        self._need_tiers().mover.erase(slots)

    def do_touch(self, slots: Sequence[int]) -> None:
        self._need_tiers().mover.touch(slots)

    def do_close_tiers(self) -> None:
        """Let what has begun end, and close the store."""
        tiers, self._tiers = self._tiers, None
        self._moving, self._erasing = set(), set()
        if tiers is not None:
            tiers.close()

    def _report(self) -> None:
        """Tell rank 0 of moves and erasures that ended."""
        if self._tiers is None:
            return
        mover = self._tiers.mover
        released, results = mover.poll_released(), mover.poll()
        erased = mover.poll_erased()
        quarantined = mover.is_quarantined(is_read=True), mover.is_quarantined(is_read=False)
        self._moving -= {result.ticket for result in results}
        self._erasing -= {erasure.slot for erasure in erased}
        if released or results or erased or quarantined != self._quarantined:
            self._quarantined = quarantined
            self._send("report", released, results, erased, quarantined)

    # ------------------------------------------------------------------ bytes

    def do_read(self, number: int, tier: TierName, slot: int, key: BlockKey) -> None:
        """Answers when the bytes are there; a disk answers from another thread."""

        def answer(found: Future[bytes | None]) -> None:
            self._send("bytes", number, found.result())

        self._port.read(tier, slot, key).add_done_callback(answer)

    def do_write(self, slot: int, payload: bytes) -> None:
        self._port.write(slot, payload)

    def do_give_back(self) -> None:
        self._port.give_back()


def main(rank: int, size: int, descriptor: int) -> None:
    """Run the worker of `rank` over the socket `descriptor`, then end this process."""
    # Ctrl-C in a terminal reaches every process of the group; the front end decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    transformers_logging.set_verbosity_error()
    connection = Connection(descriptor)
    worker = RankWorker(Shard(rank, size), connection)
    status = 0
    try:
        worker.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 1  # rank 0 has ended
    except BaseException as error:
        status = 1
        _last_words(connection, error)
    worker.do_close_tiers()
    sys.stderr.flush()
    os._exit(status)  # unloading torch takes up to seconds, and there is nothing left to do


def _last_words(connection: Connection, error: BaseException) -> None:
    """Tell rank 0 why; what only follows from another rank's end is not worth a traceback."""
    if not isinstance(error, ConfigError):
        traceback.print_exception(error)
        error = EngineDeadError(repr(error))
    try:
        connection.send(("failed", (error,)))
    except OSError:
        logger.warning("rank 0 has ended, too")


def _die_with_parent(parent: int) -> None:
    """End with rank 0's process, also while a collective waits for it."""
    while os.getppid() == parent:
        ready, _, _ = select.select([sys.stdin], [], [], _PARENT_S)
        if ready and not os.read(sys.stdin.fileno(), 1):
            break
    os._exit(1)
