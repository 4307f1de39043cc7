"""Running the application: the listening socket, signals, and the end of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import ConfigError

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


@contextlib.contextmanager
def signals_end_the_server_only() -> Iterator[None]:
    """uvicorn raises the signals that stopped it again when it is done; here that is the end."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(
    app: FastAPI,
    engine: AsyncLLM,
    listener: socket.socket,
    *,
    shutdown_timeout: int,
    log_requests: bool,
    on_ready: Callable[[], None],
) -> bool:
    """Serve until SIGTERM, SIGINT or the end of the engine.

    Args:
        shutdown_timeout: seconds that requests in flight get to finish; then they are aborted,
            and answered with what they have.
        log_requests: a line for each request.
        on_ready: called once when connections are accepted.

    Returns:
        Whether the engine still lived at the end.
    """
    config = uvicorn.Config(
        app,
        log_level="info" if log_requests else "warning",
        access_log=log_requests,
        lifespan="off",
        backlog=BACKLOG,
        timeout_graceful_shutdown=shutdown_timeout + ABORT_S,
    )
    server = uvicorn.Server(config)
    with signals_end_the_server_only():
        return asyncio.run(_serve(server, engine, listener, shutdown_timeout, on_ready))


async def _serve(
    server: uvicorn.Server,
    engine: AsyncLLM,
    listener: socket.socket,
    shutdown_timeout: int,
    on_ready: Callable[[], None],
) -> bool:
    watcher = asyncio.create_task(_watch(server, engine, shutdown_timeout, on_ready))
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
    return not engine.is_dead


async def _watch(
    server: uvicorn.Server, engine: AsyncLLM, shutdown_timeout: int, on_ready: Callable[[], None]
) -> None:
    """Say when the server is ready; stop it when the engine is dead; end what outlasts its end."""
    while not server.started:
        await asyncio.sleep(POLL_S / 10)
    on_ready()
    while not (engine.is_dead or server.should_exit):
        await asyncio.sleep(POLL_S)
    server.should_exit = True
    await asyncio.sleep(shutdown_timeout)
    engine.abort_all()
