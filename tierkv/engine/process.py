"""The engine in its own process: a loop between two sockets.

Started by `tierkv.engine.client` as a fresh interpreter. Its standard input is a pipe whose other
end only the front end holds, so the end of that pipe is the end of the front end, however it died.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from tierkv import logs
from tierkv.config import EngineConfig
from tierkv.engine import wire
from tierkv.engine.beam_runner import BeamRunner
from tierkv.engine.core import EngineCore
from tierkv.engine.grammar_queue import GrammarQueue
from tierkv.engine.observe import Observer
from tierkv.engine.outputs import SequenceOutput
from tierkv.errors import ConfigError, RequestError
from tierkv.types import FinishReason

TO_ENGINE, FROM_ENGINE = "to-engine", "from-engine"
_LINGER_MS = 2000
_BACKGROUND_MS = 5
_ALIVE_MS = 1000  # between two looks whether workers live, while there is nothing to do


class EngineLoop:
    """Serves one engine: receive, step, send, and sleep on the socket when there is no work.

    Args:
        engine: the loaded engine.
        inbox: PULL socket of messages to the engine.
        outbox: PUSH socket of messages from it.
    """

    def __init__(
        self, engine: EngineCore, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]
    ) -> None:
        self._engine, self._inbox, self._outbox = engine, inbox, outbox
        self._is_stopping = False
        self._grammars, self._beams = GrammarQueue(engine.grammars), BeamRunner(engine)
        self._handlers: dict[str, Callable[..., None]] = {
            "add": self._add,
            "abort": self._abort,
            "stop": engine.stop_sequence,
            "call": self._call,
            "shutdown": self._shut_down,
        }
        observer = Observer(engine.scheduler)
        self._calls: dict[str, Callable[..., Any]] = {
            "metrics": engine.metrics,
            "reset_prefix_cache": engine.reset_prefix_cache,
            "ping": lambda: True,
            "snapshot": observer.snapshot,
            "request": observer.request,
            **engine.control.calls,
        }

    def run(self) -> None:
        """Until the front end says `shutdown`."""
        while True:
            self._receive()
            if self._is_stopping:
                return
            if outputs := self._beams.advance(self._engine.step()):
                self._send("outputs", [wire.encode_output(output) for output in outputs])

    def _receive(self) -> None:
        """Handle all messages that are there; wait for one when the engine has no work."""
        while not self._is_stopping:
            self._add_compiled()
            if not self._engine.has_work:
                self._wait()
            self._watch()
            try:
                message = self._inbox.recv(zmq.NOBLOCK if self._engine.has_work else 0)
            except zmq.Again:
                return
            self._handle(message)
            while not self._is_stopping and self._inbox.poll(0):
                self._handle(self._inbox.recv())
            if self._engine.has_work:
                return

    def _wait(self) -> None:
        """For a message or a grammar; moves that are under way go on meanwhile."""
        while not self._grammars.is_empty or self._engine.has_background_work:
            if self._inbox.poll(_BACKGROUND_MS):
                return
            if self._engine.has_background_work:
                self._engine.work_in_background()
            self._add_compiled()
            if self._engine.has_work:
                return

    def _watch(self) -> None:
        """Where the engine has worker processes, wait for a message and look that they live."""
        workers = self._engine.workers
        while workers is not None and not self._engine.has_work:
            workers.check()
            if self._inbox.poll(_ALIVE_MS):
                return

    def _handle(self, message: bytes) -> None:
        kind, values = wire.unpack(message)
        self._handlers[kind](*values)

    def _send(self, kind: str, *values: Any) -> None:
        self._outbox.send(wire.pack(kind, *values))

    def _add(self, packed: list[Any]) -> None:
        try:
            request = wire.decode_request(packed)
            if request.beam is not None:
                self._beams.add(request)
            elif not self._grammars.add(request):
                self._engine.add_request(request)
        except RequestError as error:
            self._reject(packed[0], error)

    def _add_compiled(self) -> None:
        """Go on with requests that waited for their grammar."""
        if self._grammars.is_empty:
            return
        for request, grammar in self._grammars.take():
            try:
                if isinstance(grammar, RequestError):
                    raise grammar
                self._engine.add_request(request, grammar)
            except RequestError as error:
                self._reject(request.request_id, error)

    def _reject(self, request_id: str, error: RequestError) -> None:
        self._send("rejected", request_id, wire.encode_error(error))

    def _abort(self, request_ids: list[str]) -> None:
        held = self._grammars.discard(request_ids)
        ended = [SequenceOutput(i, -1, 0, [], finish_reason=FinishReason.ABORT) for i in held]
        if ended:
            self._send("outputs", [wire.encode_output(output) for output in ended])
        self._engine.abort(request_ids)

    def _call(self, call_id: int, name: str, *arguments: Any) -> None:
        try:
            self._send("result", call_id, self._calls[name](*arguments))
        except RequestError as error:
            self._send("refused", call_id, wire.encode_error(error))

    def _shut_down(self) -> None:
        self._is_stopping = True


def main(directory: str, log_format: str | None = None) -> None:
    """Run the engine behind the sockets in `directory`, then end this process."""
    if log_format is not None:
        logs.configure(log_format)
    # Ctrl-C in a terminal, and SIGTERM of a service manager, reach every process of the group; the
    # front end decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(directory,), daemon=True).start()
    with zmq.Context() as context:
        inbox = bind_pull(context, Path(directory) / TO_ENGINE)
        outbox = connect_push(context, Path(directory) / FROM_ENGINE)
        outbox.linger = _LINGER_MS
        with inbox, outbox:
            status = _serve(inbox, outbox)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # unloading torch takes up to seconds, and there is nothing left to do


def bind_pull(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> zmq.Socket[bytes]:
    """The receiving end, a socket file of mode 0600."""
    socket = context.socket(zmq.PULL)
    socket.set_hwm(0)  # requests are bounded elsewhere; no message may be dropped
    socket.bind(f"ipc://{path}")
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    return socket


def connect_push(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> zmq.Socket[bytes]:
    """The sending end. Connected, not bound: a bound one blocks while it has no peer."""
    socket = context.socket(zmq.PUSH)
    socket.set_hwm(0)
    socket.connect(f"ipc://{path}")
    return socket


def _serve(inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> int:
    _, (options,) = wire.unpack(inbox.recv())
    try:
        engine = EngineCore.from_config(EngineConfig.from_mapping(options))
        if engine.grammars is not None:
            engine.grammars.preload()
    except BaseException as error:
        return _report("failed", error, outbox)
    # The model's objects live as long as the process: no collection need look at them again.
    gc.collect()
    gc.freeze()
    outbox.send(wire.pack("ready", wire.encode_info(engine.info)))
    try:
        EngineLoop(engine, inbox, outbox).run()
        engine.close()
    except BaseException as error:
        return _report("dead", error, outbox)
    return 0


def _report(kind: str, error: BaseException, outbox: zmq.Socket[bytes]) -> int:
    if not isinstance(error, ConfigError):
        traceback.print_exception(error)
    outbox.send(wire.pack(kind, wire.encode_error(error)))
    return 1


def _die_with_parent(directory: str) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
