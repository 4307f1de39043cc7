"""`tierkv top`: frames of every width, and servers that answer, refuse, end or are not there."""

from __future__ import annotations

import http.server
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tierkv.cli import top
from tierkv.cli.main import main
from tierkv.cli.top_frame import Screen, Style, bytes_text, frame, shares, strip
from tierkv.engine.observe import ROW
from tierkv.errors import ConfigError
from tierkv.server.feed_rates import SAMPLE

HELLO = {
    "type": "hello", "version": "1.2", "model": "some/model", "dtype": "bfloat16", "device": "cpu",
    "block_size": 16, "row": ROW, "sample": SAMPLE, "history": [],
}  # fmt: skip


def tier(name: str, capacity: int, **counts: int) -> dict[str, Any]:
    kinds = dict.fromkeys(("in_use", "cached", "filling", "draining"), 0) | counts
    return {"name": name, "capacity": capacity, "empty": capacity - sum(kinds.values()), **kinds}


def row(request: str, state: str, **values: Any) -> list[Any]:
    blank: dict[str, Any] = dict.fromkeys(ROW, 0)
    return list((blank | {"request": request, "state": state} | values).values())


def snapshot(generated: float | None = 412.34) -> dict[str, Any]:
    link = {"source": "gpu", "destination": "cpu", "bytes_per_s": 1_240_000_000}
    idle = {"source": "cpu", "destination": "gpu", "bytes_per_s": 0}
    rows = [
        row("cmpl-1/7", "decode", prompt_tokens=1024, generated_tokens=37, blocks=67, gpu=67),
        row("cmpl-2/8", "queued", prompt_tokens=64, blocks=4, gpu=1, cpu=2, age_s=0.25),
        row("no number", "finished", prompt_tokens=5, generated_tokens=2, age_s=7300.0),
    ]
    pool = tier("gpu", 512, in_use=300, cached=100, filling=12)
    return {
        "type": "snapshot",
        "tiers": [pool, tier("cpu", 9000, cached=9)],
        "links": [link, idle],
        "sample": [1.0, generated, 60.0, 0.5, 0.125, 0.0, 1, 3],
        "running": 1,
        "rows": rows,
    }  # fmt: skip


def screen_of(*events: dict[str, Any]) -> Screen:
    screen = Screen()
    for event in events:
        screen.take(event)
    return screen


# ---------------------------------------------------------------------- frames


def test_a_frame_says_what_the_page_says() -> None:
    lines = frame(screen_of(HELLO, snapshot()), Style(columns=120))
    text = "\n".join(lines)
    assert "tierkv some/model  bfloat16 on cpu, blocks of 16 tokens, v1.2" in lines[0]
    assert "generated 412 tok/s   prompt 60.0 tok/s   from cache 62% (gpu 50%, cpu 12%)" in text
    assert "running 1   queued 3" in text
    assert "300 in use, 100 cached, 12 filling, 100 empty" in text
    assert "→ cpu 1.24 GB/s" in text and "→ gpu 0 B/s" in text
    assert "cmpl-1 " in text and "1,024 + 37" in text and "67 gpu" in text
    assert "1 gpu, 2 cpu, 1 to compute" in text and "0.2 s" in text
    assert "no number" in text and "2 h" in text


@pytest.mark.parametrize("columns", [50, 64, 80, 100, 200])
@pytest.mark.parametrize("has_color", [False, True])
@pytest.mark.parametrize("is_plain", [False, True])
def test_no_line_is_longer_than_the_terminal(columns: int, has_color: bool, is_plain: bool) -> None:
    style = Style(columns, 24, has_color, is_plain)
    lines = frame(screen_of(HELLO, *[snapshot(10.0**i) for i in range(-1, 7)]), style)
    assert max(len(strip(line)) for line in lines) <= columns
    text = "\n".join(lines)
    assert ("\x1b[" in text) == has_color
    assert not is_plain or text.replace("…", "~").isascii()
    assert len(lines) <= 24


def test_a_frame_without_speeds_and_without_requests() -> None:
    nothing = snapshot(None) | {"rows": []}
    nothing["sample"] = [1.0, None, None, None, None, None, 0, 0]
    text = "\n".join(frame(screen_of(HELLO, nothing), Style()))
    assert "generated - tok/s" in text and "from cache -" in text and "no requests yet" in text
    assert frame(Screen(), Style())[1] == "waiting for the server"
    ended = screen_of(HELLO, snapshot(), {"type": "end", "reason": "the server is stopping"})
    assert "the server is stopping" in frame(ended, Style())[0]


def test_a_low_terminal_shows_fewer_requests() -> None:
    many = snapshot() | {"rows": [row(f"r{i}/{i}", "decode") for i in range(50)]}
    assert len(frame(screen_of(HELLO, many), Style(lines=20))) <= 20


def test_bars_have_their_width() -> None:
    for counts in ([1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [999, 0, 0, 0, 1], [3, 5, 7, 11, 13]):
        found = shares(counts, 37)
        assert sum(found.values()) == (37 if sum(counts) else 0) and min(found.values()) >= 0
    assert [bytes_text(v) for v in (0, 999, 1240, 5e9, 2e15)] == [
        "0 B", "999 B", "1.24 kB", "5 GB", "2e+03 TB",
    ]  # fmt: skip


# ---------------------------------------------------------------------- servers


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with the same status and events."""

    daemon_threads = True

    def __init__(self, status: int, events: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.events = status, events
        self.seen: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(b": still here\n\n")
        for event in self.server.events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Parametrised with (status, events)."""
    with Server(*request.param) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


GOOD = (200, [HELLO, *[snapshot()] * 8])


@pytest.mark.parametrize("server", [GOOD], indirect=True)
def test_once_prints_one_frame(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--url", server.url, "--api-key", "KEY"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("tierkv some/model") == 1 and "\x1b" not in printed
    assert server.seen == [("/dashboard/events", "Bearer KEY")]


@pytest.mark.parametrize("server", [GOOD], indirect=True)
def test_the_key_may_come_from_the_environment_and_the_url_may_be_short(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERKV_API_KEY", "from outside")
    assert main(["top", "--once", "--url", f"127.0.0.1:{server.server_port}/dashboard"]) == 0
    assert server.seen == [("/dashboard/events", "Bearer from outside")]


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ((401, []), "asks for its API key: give it with --api-key"),
        ((403, [{"error": {"message": "needs an admin key"}}]), "refuses this key"),
        ((404, []), "is it a tierkv server?"),
        ((503, []), "answered 503"),
        ((200, []), "closed the connection"),
        ((200, [HELLO, {"type": "end", "reason": "the engine died"}]), "the engine died"),
    ],
    indirect=["server"],
)
def test_once_fails_with_the_reason(
    server: Server, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--once", "--url", server.url]) == 1
    assert message in capsys.readouterr().err


def test_no_server_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert main(["top", "--once", "--url", url]) == 1
    assert f"no answer from {url}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--url", "ftp://x"], ["--url", "http://"], ["--interval", "0"]]
)
def test_bad_options_are_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("server", [GOOD], indirect=True)
def test_without_a_terminal_frames_follow_one_another_until_ctrl_c(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", pause)
    assert main(["top", "--url", server.url, "--interval", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("some/model") >= 4 and "\x1b" not in printed
    assert "closed the connection; trying again" in printed and len(server.seen) == 2


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("server", [GOOD], indirect=True)
def test_in_a_terminal_frames_replace_one_another(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert main(["top", "--url", server.url]) == 0
    written = terminal.getvalue()
    assert written.startswith(top.ENTER) and written.endswith(top.LEAVE)
    assert top.HOME in written and "\x1b[38;5;209m" in written


def test_an_ascii_terminal_gets_ascii() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    top.show(screen_of(HELLO, snapshot()), out, has_color=False, is_live=False)
    out.seek(0)
    assert "#####" in out.read()


def test_it_loads_no_torch_and_no_web_framework() -> None:
    program = "import sys, tierkv.cli.top; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "fastapi"} & set(done.stdout.split())


def test_a_refusal_is_passed_on() -> None:
    assert top.message_in(b'{"error": {"message": "needs an admin key"}}') == "needs an admin key"
    for body in (b"", b"[]", b"{}", b'{"error": 3}'):
        assert top.message_in(body) == "the server refuses this key"


def test_addresses() -> None:
    assert top.checked_url("box:8000") == "http://box:8000"
    assert top.checked_url("https://a/b/dashboard?x=1") == "https://a/b"
    with pytest.raises(ConfigError, match="address such as"):
        top.checked_url("ftp://box")
