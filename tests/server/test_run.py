"""The listening socket, and what signals mean."""

from __future__ import annotations

import signal
import socket
from typing import Any

import pytest
import uvicorn

from tierkv.errors import ConfigError
from tierkv.server.run import Server, Stop, bind, url_of


def test_a_bound_port_refuses_clients_until_it_listens() -> None:
    with bind("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        assert url_of(listener) == f"http://{host}:{port}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="Address already in use") as caught:
            bind("127.0.0.1", port)
    assert caught.value.option == "port"


class FakeEngine:
    num_kills = 0

    def kill(self) -> None:
        self.num_kills += 1


def test_the_first_signal_drains_and_the_second_ends() -> None:
    engine: Any = FakeEngine()
    server = Server(uvicorn.Config("none:none", log_config=None))
    stop = Stop(server, engine)
    before = signal.getsignal(signal.SIGTERM)
    with stop.on_signals():
        with server.capture_signals():  # uvicorn's handlers do not take over
            signal.raise_signal(signal.SIGTERM)
        assert (server.should_exit, server.force_exit, engine.num_kills) == (True, False, 0)
        signal.raise_signal(signal.SIGINT)
        assert (server.force_exit, engine.num_kills, stop.num_signals) == (True, 1, 2)
    assert signal.getsignal(signal.SIGTERM) is before
