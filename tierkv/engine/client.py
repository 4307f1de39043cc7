"""The front end's end of an engine process: starts it, talks to it, notices its death."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq

from tierkv.config import EngineConfig
from tierkv.engine import wire
from tierkv.engine.core import EngineInfo
from tierkv.engine.process import FROM_ENGINE, TO_ENGINE, bind_pull, connect_push
from tierkv.errors import EngineDeadError

_MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes
_LAST_WORDS_MS = 200  # how long to wait for messages of an engine that has ended
_EXIT_S = 20.0  # an engine's close takes up to 15
# The child sees the same modules as its parent, wherever it was started from; a plain new
# interpreter needs no `if __name__ == "__main__"` in the user's program.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tierkv.engine.process import main; main(*sys.argv[2:])"
)

Message = Callable[[str, list[Any]], None]
Death = Callable[[EngineDeadError], None]


class EngineClient:
    """A running engine process.

    `send` may be called from any thread. Messages and the death of the process are delivered
    from one thread of this object's own; both callbacks are held weakly, so the owner of this
    object can be collected (and then closes it).

    Args:
        config: engine options.
        log_format: how the process logs; None leaves Python's defaults.

    Raises:
        TierkvError: what the engine raised while it started (a ConfigError, ...).
        EngineDeadError: it ended without saying why.
    """

    def __init__(self, config: EngineConfig, log_format: str | None = None) -> None:
        self._directory = _make_directory()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._send_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last_words = ""
        self._is_closed = False
        self._outbox = connect_push(self._context, self._directory / TO_ENGINE)
        self._inbox = bind_pull(self._context, self._directory / FROM_ENGINE)
        self.process = _launch(self._directory, log_format)
        self._finalizer = weakref.finalize(self, _clean_up, self.process, self._directory)
        try:
            self.send("start", wire.encode_config(config))
            self.info: EngineInfo = self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def listen(self, on_message: Message, on_death: Death) -> None:
        """Start delivering; both must be bound methods."""
        methods = weakref.WeakMethod(on_message), weakref.WeakMethod(on_death)
        self._thread = threading.Thread(
            target=self._deliver, args=methods, name="tierkv-engine", daemon=True
        )
        self._thread.start()

    def send(self, kind: str, *values: Any) -> None:
        """Queue a message; what is sent to a dead engine goes nowhere."""
        self.send_packed(wire.pack(kind, *values))

    def send_packed(self, message: bytes) -> None:
        """Queue a message made by `wire.pack`."""
        with self._send_lock:
            if not self._outbox.closed:
                self._outbox.send(message)

    def kill(self) -> None:
        """End the process at once. `close` is still due."""
        self.process.kill()

    def close(self) -> None:
        """End the process, politely at first, and remove its sockets. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self.send("shutdown")
        if self._thread is None:  # still starting: it does not read messages yet
            self.process.kill()
        try:
            self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._send_lock:
            self._outbox.close(linger=0)
        self._inbox.close(linger=0)
        self._context.term()
        self._finalizer()

    # -- receiving -----------------------------------------------------------------------------

    def _wait_until_ready(self) -> EngineInfo:
        for kind, values in self._receive():
            if kind == "ready":
                return wire.decode_info(*values)
            raise wire.decode_error(*values)
        raise self._death()

    def _receive(self) -> Iterator[tuple[str, list[Any]]]:
        """(kind, fields) of each message until the process has ended."""
        pidfd = os.pidfd_open(self.process.pid)
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(pidfd, zmq.POLLIN)
        try:
            while not self._inbox.closed:
                is_over = any(ready == pidfd for ready, _ in poller.poll())
                while not self._inbox.closed and self._inbox.poll(_LAST_WORDS_MS if is_over else 0):
                    yield wire.unpack(self._inbox.recv())
                if is_over:
                    return
        finally:
            os.close(pidfd)

    def _deliver(
        self, on_message: weakref.WeakMethod[Message], on_death: weakref.WeakMethod[Death]
    ) -> None:
        last_words = "its front end failed"
        try:
            for kind, values in self._receive():
                if kind == "dead":
                    self._last_words = str(wire.decode_error(*values))
                elif (deliver := on_message()) is not None:
                    deliver(kind, values)
                    del deliver  # or the owner would live until the next message
            last_words = ""
        finally:
            if (bury := on_death()) is not None:
                bury(EngineDeadError(last_words) if last_words else self._death())

    def _death(self) -> EngineDeadError:
        status = self.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        words = f": {self._last_words}" if self._last_words else ""
        return EngineDeadError(f"the engine process ended ({how}){words}")


def _make_directory() -> Path:
    """A private directory (mode 0700) for the sockets."""
    directory = Path(tempfile.mkdtemp(prefix="tierkv-"))
    if len(str(directory / FROM_ENGINE)) > _MAX_SOCKET_PATH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="tierkv-", dir="/tmp"))
    return directory


def _launch(directory: Path, log_format: str | None) -> subprocess.Popen[bytes]:
    modules = json.dumps([path for path in sys.path if isinstance(path, str)])
    command = [sys.executable, "-c", _PROGRAM, modules, str(directory)]
    environment = dict(os.environ)
    if log_format is not None:
        command.append(log_format)
    if log_format == "json":
        environment |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)


def _clean_up(process: subprocess.Popen[bytes], directory: Path) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
    shutil.rmtree(directory, ignore_errors=True)
