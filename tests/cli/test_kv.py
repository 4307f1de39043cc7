"""`tierkv kv`: what it asks a server, with which key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tierkv.cli.main import main

ADMINS = ("flush", "export", "import", "sleep", "wake")


class Answers(BaseHTTPRequestHandler):
    """Notes what it is asked; answers what `reply` says."""

    asked: list[tuple[str, str, str | None, bytes]]
    reply: tuple[int, bytes]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = self.headers.get("Authorization")
        self.asked.append((self.command, self.path, key, body))
        status, content = self.reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Be quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    """A server that answers anything; both keys are in the environment."""
    monkeypatch.setenv("TIERKV_API_KEY", "user")
    monkeypatch.setenv("TIERKV_ADMIN_API_KEY", "admin")
    handler: Any = type("Handler", (Answers,), {"asked": [], "reply": (200, b'{"flushed": true}')})
    listener = HTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    yield handler
    listener.shutdown()
    thread.join()
    listener.server_close()


def kv(server: Any, *arguments: str) -> int:
    return main(["kv", *arguments, "--url", server.url])


@pytest.mark.parametrize("action", ["warm", "pin", "unpin", "ttl", *ADMINS])
def test_administrators_actions_take_their_key_from_the_environment(
    server: Any, action: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    words = {
        "export": ["--session-id", "s", "--output", str(tmp_path / "out")],
        "import": [str(tmp_path / "file")],
        **{name: ["--prompt", "hello"] for name in ("warm", "pin", "unpin", "ttl")},
    }
    arguments = words.get(action, [])
    assert kv(server, action, *arguments) == 0
    assert kv(server, action, *arguments, "--api-key", "given") == 0
    keys = [key for _, _, key, _ in server.asked]
    own = "admin" if action in ADMINS else "user"
    assert keys == [f"Bearer {own}", "Bearer given"]


def test_without_a_key_for_administrators_the_other_is_tried(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIERKV_ADMIN_API_KEY")
    assert kv(server, "flush") == 0
    assert server.asked[0][2] == "Bearer user"


def test_what_a_pin_says(server: Any) -> None:
    assert kv(server, "pin", "--session-id", "s", "--ttl", "3", "--cache-salt", "x") == 0
    method, path, _, body = server.asked[0]
    assert (method, path) == ("POST", "/kv/pin")
    assert json.loads(body) == {"session_id": "s", "ttl": 3.0, "cache_salt": "x"}


def test_a_refusal_is_one_line(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = (409, b'{"error": {"message": "the pin budget is 3 blocks"}}')
    assert kv(server, "pin", "--prompt", "x") == 1
    assert capsys.readouterr().err.endswith("the pin budget is 3 blocks\n")
    server.reply = (502, b"<html>")
    assert kv(server, "stats") == 1
    assert "it answered 502" in capsys.readouterr().err


def test_an_export_that_is_refused_leaves_no_file(server: Any, tmp_path: Path) -> None:
    server.reply = (404, b'{"error": {"message": "no such session"}}')
    target = tmp_path / "out"
    target.write_bytes(b"what was there")
    assert kv(server, "export", "--session-id", "s", "-o", str(target)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert target.read_bytes() == b"what was there"


@pytest.mark.parametrize("key", ["ключ", "two\nlines", "tab\t"])
@pytest.mark.parametrize("command", [["kv", "stats"], ["top", "--once"]])
def test_a_key_that_http_cannot_carry(
    command: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--api-key", key]) == 1
    words = capsys.readouterr().err
    assert "HTTP cannot carry" in words and key not in words


def test_without_a_server_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "stats", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer from" in capsys.readouterr().err
