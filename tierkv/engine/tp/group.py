"""Rank 0's side of the workers: start them, talk to them, notice a death, end them.

A worker is a fresh interpreter (so a user's program needs no `if __name__ == "__main__"`) with one
end of a socket pair. A thread per worker reads what it says; the end of the socket is the end of
the worker, and everything that is asked of it from then on is an `EngineDeadError`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tierkv.config import EngineConfig
from tierkv.engine.tp import ranks
from tierkv.errors import ConfigError, EngineDeadError, TierkvError
from tierkv.model.device import choose_device
from tierkv.model.shard import OPTION, Shard
from tierkv.types import BlockKey, Erasure, Move, MoveResult, TierName

logger = logging.getLogger(__name__)

_EXIT_S = 15.0  # moves that have begun, and the store, get this long
_NOTICE_S = 1.0  # for the end of a socket, when something else failed first
# The child sees the same modules as its parent, wherever that was started from.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tierkv.engine.tp.worker import main; main(*map(int, sys.argv[2:]))"
)


class Worker:
    """Rank 0's handle of one worker.

    Args:
        shard: which part of the model it has.
        on_death: called when it has ended, from a thread of this object's own.

    Attributes:
        mover: moves the worker's blocks.
    """

    def __init__(self, shard: Shard, on_death: Callable[[], None]) -> None:
        self.shard = shard
        self.mover = RemoteMover(self)
        self.process, self._connection = _launch(shard)
        self._on_death = on_death
        self._send_lock = threading.Lock()
        self._news = threading.Condition()
        self._replies: deque[Any] = deque()
        self._reads: dict[int, Future[bytes | None]] = {}
        self._numbers = itertools.count()
        self._error: TierkvError | None = None
        self._is_ending = False
        self._thread = threading.Thread(
            target=self._receive, name=f"tierkv-rank-{shard.rank}", daemon=True
        )
        self._thread.start()

    def send(self, kind: str, *values: Any) -> None:
        """Queue a command.

        Raises:
            TierkvError: the worker has ended; its own words where it left some.
        """
        self.check()
        try:
            with self._send_lock:
                self._connection.send((kind, values))
        except OSError as error:
            self._thread.join(_NOTICE_S)
            raise self._error or self._died() from error

    def reply(self, timeout_s: float | None = None) -> Any:
        """The next answer to a command that has one.

        Raises:
            TierkvError: the worker has ended; ConfigError: no answer in time.
        """
        with self._news:
            self._news.wait_for(lambda: self._replies or self._error is not None, timeout_s)
            if self._replies:
                return self._replies.popleft()
        self.check()
        fix = f"rank {self.shard.rank} did not start within {timeout_s:g} s"
        raise ConfigError(OPTION, self.shard.size, fix)

    def read(self, tier: TierName, slot: int, key: BlockKey) -> Future[bytes | None]:
        """A block's bytes on this rank."""
        number, found = next(self._numbers), Future[bytes | None]()
        with self._news:
            self._reads[number] = found
        self.send("read", number, tier, slot, key)
        return found

    def check(self) -> None:
        """Raise what the worker ended with, if it has."""
        if self._error is not None:
            raise self._error

    def notice(self, timeout_s: float) -> None:
        """Wait for the end of a worker that may just have died."""
        self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        return self._error is None

    def end(self) -> None:
        """Ask it to end; `wait` waits."""
        self._is_ending = True
        if self.is_alive:
            try:
                self.send("exit")
            except TierkvError:
                logger.debug("rank %d ended by itself", self.shard.rank)

    def wait(self, timeout_s: float) -> None:
        """Until it has ended; it is killed after `timeout_s`."""
        try:
            self.process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._connection.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    # ------------------------------------------------------------------ its messages

    def _receive(self) -> None:
        try:
            while True:
                kind, values = self._connection.recv()
                self._handle(kind, values)
        except (EOFError, OSError):
            self._bury()

    def _handle(self, kind: str, values: tuple[Any, ...]) -> None:
        if kind == "report":
            self.mover.note(*values)
        elif kind == "bytes":
            number, payload = values
            with self._news:
                found = self._reads.pop(number)
            found.set_result(payload)
        elif kind == "failed":
            (error,) = values
            is_ours = isinstance(error, ConfigError)
            self._error = error if is_ours else EngineDeadError(f"{self._name}: {error}")
        else:
            with self._news:
                self._replies.append(values[0])
                self._news.notify_all()

    @property
    def _name(self) -> str:
        return f"the worker of rank {self.shard.rank}"

    def _bury(self) -> None:
        error = self._died()
        with self._news:
            self._error = self._error or error
            self._news.notify_all()
            reads, self._reads = self._reads, {}
        for found in reads.values():
            found.set_result(None)
        if not self._is_ending:
            self._on_death()

    def _died(self) -> EngineDeadError:
        try:
            status = self.process.wait(_NOTICE_S)
        except subprocess.TimeoutExpired:
            return EngineDeadError(f"{self._name} has closed its socket")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return EngineDeadError(f"{self._name} ended ({how})")


class RemoteMover:
    """The mover of a worker; what it did comes in the worker's reports.

    Attributes:
        quarantined: whether reads from, and writes to, its store are refused.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._results: list[MoveResult] = []
        self._released: list[int] = []
        self._erased: list[Erasure] = []
        self.quarantined = (False, False)
        self._is_closed = False

    def note(
        self,
        released: list[int],
        results: list[MoveResult],
        erased: list[Erasure],
        quarantined: tuple[bool, bool],
    ) -> None:
        """Take a report in."""
        with self._lock:
            self._released += released
            self._results += results
            self._erased += erased
            self.quarantined = quarantined

    def begin(self, moves: Sequence[Move]) -> None:
        self._worker.send("begin", moves)

    def poll(self) -> list[MoveResult]:
        self._worker.check()
        with self._lock:
            results, self._results = self._results, []
        return results

    def poll_released(self) -> list[int]:
        with self._lock:
            released, self._released = self._released, []
        return released

    def poll_erased(self) -> list[Erasure]:
        with self._lock:
            erased, self._erased = self._erased, []
        return erased

    def abandon(self, tickets: Sequence[int]) -> None:
        self._worker.send("abandon", tickets)

    def wait(self, timeout_s: float) -> None:
        """Wait the whole time: whoever has several movers waits for the nearest."""
        time.sleep(timeout_s)

    def erase(self, slots: Sequence[int]) -> None:
        self._worker.send("erase", slots)

    def touch(self, slots: Sequence[int]) -> None:
        self._worker.send("touch", slots)

    def is_quarantined(self, *, is_read: bool) -> bool:
        return self.quarantined[0 if is_read else 1]

    def close(self) -> None:
        """The worker closes its tiers; its end is waited for where the worker's is."""
        if not self._is_closed and self._worker.is_alive:
            self._is_closed = True
            self._worker.send("close_tiers")


class TpGroup:
    """All workers of one engine.

    Args:
        config: engine options; `tensor_parallel_size` ranks, this process the first of them.

    Raises:
        ConfigError: they cannot be started, or did not find each other.
    """

    def __init__(self, config: EngineConfig) -> None:
        ranks.check_ranks(config)
        self.size = config.tensor_parallel_size
        self._device = choose_device(config.device).type
        self._owner = os.getpid()
        self._num_threads: int | None = None
        self.workers: list[Worker] = []
        store = ranks.make_store(self.size)
        try:
            for rank in range(1, self.size):
                self.workers.append(Worker(Shard(rank, self.size), self._give_up))
            self.tell("start", config, store.port)
            self.replies(ranks.SETUP_S)
            ranks.join(store, self.shard, self._device)
        except BaseException:
            self.close(0.0)
            raise
        self._num_threads = ranks.share_threads(config)

    @property
    def shard(self) -> Shard:
        """This process's own part."""
        return Shard(0, self.size)

    def tell(self, kind: str, *values: Any) -> None:
        """Give every worker a command."""
        for worker in self.workers:
            worker.send(kind, *values)

    def replies(self, timeout_s: float | None = None) -> list[Any]:
        """What each worker answers to a command that has an answer."""
        return [worker.reply(timeout_s) for worker in self.workers]

    def check(self) -> None:
        """Raise EngineDeadError if a worker has ended."""
        for worker in self.workers:
            worker.check()

    @property
    def is_alive(self) -> bool:
        """All workers are."""
        return all(worker.is_alive for worker in self.workers)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Of what fails because a worker has ended, the cause is that."""
        self.check()
        try:
            yield
        except Exception as error:
            self._notice()
            if not self.is_alive and not isinstance(error, EngineDeadError):
                first = next(worker for worker in self.workers if not worker.is_alive)
                try:
                    first.check()
                except TierkvError as death:
                    raise death from error
            raise

    def _notice(self) -> None:
        """Give a death, of which this process felt the consequences, time to be known."""
        end_s = time.monotonic() + _NOTICE_S
        while self.is_alive and (left_s := end_s - time.monotonic()) > 0:
            self.workers[0].notice(min(left_s, 0.05))

    def _give_up(self) -> None:
        ranks.give_up(self._device)

    def close(self, timeout_s: float = _EXIT_S) -> None:
        """End the workers, and be one process again. Idempotent."""
        if os.getpid() != self._owner:
            return
        workers, self.workers = self.workers, []
        if not all(worker.is_alive for worker in workers):
            timeout_s = 0.0  # the others may wait for the dead one for ever
        for worker in workers:
            worker.end()
        end_s = time.monotonic() + timeout_s
        for worker in workers:
            worker.wait(end_s - time.monotonic())
        ranks.leave(self._num_threads)


def _launch(shard: Shard) -> tuple[subprocess.Popen[bytes], Connection]:
    """A worker's process, and this end of its socket."""
    own, its = socket.socketpair()
    modules = json.dumps([path for path in sys.path if isinstance(path, str)])
    numbers = [shard.rank, shard.size, its.fileno()]
    command = [sys.executable, "-c", _PROGRAM, modules, *map(str, numbers)]
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with its:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=environment, pass_fds=[its.fileno()]
        )
    return process, Connection(own.detach())
