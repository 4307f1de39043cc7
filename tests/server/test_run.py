"""The listening socket."""

from __future__ import annotations

import socket

import pytest

from tierkv.errors import ConfigError
from tierkv.server.run import bind, url_of


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
