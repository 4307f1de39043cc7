"""Running the application: the listening socket, signals, and the end of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from tierkv import logs
from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import ConfigError

announcer = logging.getLogger(logs.ANNOUNCER)

POLL_S = 0.2
BACKLOG = 2048
ABORT_S = 2
"""Seconds that aborted requests get to send their last words before they are cut off."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the model is loaded.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError("host", host, f"is no address: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError("port", port, f"cannot be used on {host}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """`http://host:port` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does: whatever is being loaded is let go."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Ending(enum.Enum):
    """How serving came to its end."""

    DRAINED = enum.auto()
    """A signal: what was in flight has been finished, or aborted when its time was over."""

    CUT_OFF = enum.auto()
    """A second signal: at once."""

    ENGINE_DIED = enum.auto()


class Server(uvicorn.Server):
    """uvicorn's server; what signals mean is for `Stop` to say."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Stop:
    """SIGTERM and SIGINT while serving: the first one drains, a second one ends at once.

    Args:
        server: takes no more connections after the first.
        engine: its process is killed by the second, also while it lets go of its tiers.
    """

    def __init__(self, server: Server, engine: AsyncLLM) -> None:
        self._server, self._engine = server, engine
        self.num_signals = 0

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle them while in the context."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.num_signals += 1
        self._server.should_exit = True
        if self.num_signals > 1:
            self._server.force_exit = True
            self._engine.kill()


def serve(
    app: FastAPI,
    engine: AsyncLLM,
    listener: socket.socket,
    *,
    shutdown_timeout: int,
    on_ready: Callable[[], None],
) -> Ending:
    """Serve until SIGTERM, SIGINT or the end of the engine; then let the engine go.

    Args:
        shutdown_timeout: seconds that requests in flight get to finish; then they are aborted,
            and answered with what they have.
        on_ready: called once when connections are accepted.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_graceful_shutdown=shutdown_timeout + ABORT_S,
    )
    server = Server(config)
    stop = Stop(server, engine)

    def on_stop() -> None:
        app.state.context.is_exiting = True

    with stop.on_signals():
        watch = _watch(server, engine, shutdown_timeout, on_ready, on_stop)
        asyncio.run(_serve(server, listener, watch))
        is_alive = not engine.is_dead
        engine.shutdown()
    if stop.num_signals > 1:
        return Ending.CUT_OFF
    return Ending.DRAINED if is_alive else Ending.ENGINE_DIED


async def _serve(server: Server, listener: socket.socket, watch: Coroutine[Any, Any, None]) -> None:
    watcher = asyncio.create_task(watch)
    try:
        await server.serve(sockets=[listener])
        if server.force_exit and (tasks := server.server_state.tasks):
            await asyncio.wait(list(tasks), timeout=ABORT_S)  # each answers that its engine is gone
    finally:
        watcher.cancel()


async def _watch(
    server: Server,
    engine: AsyncLLM,
    shutdown_timeout: int,
    on_ready: Callable[[], None],
    on_stop: Callable[[], None],
) -> None:
    """Say when the server is ready; stop it when the engine is dead; end what outlasts its end."""
    while not server.started:
        await asyncio.sleep(POLL_S / 10)
    on_ready()
    while not (engine.is_dead or server.should_exit):
        await asyncio.sleep(POLL_S)
    server.should_exit = True
    on_stop()
    if num_open := len(server.server_state.tasks):
        text = "stopping: %d requests get up to %d s to finish; a second signal ends at once"
        announcer.info(text, num_open, shutdown_timeout)
    await asyncio.sleep(shutdown_timeout)
    engine.abort_all()
