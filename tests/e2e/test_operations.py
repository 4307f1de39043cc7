"""`tierkv serve` in operation: machines read its logs, signals insist, the engine is killed."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from servable import ServerProcess, running_server

SMALL = ("--num-gpu-blocks", "256", "--num-threads", "1", "--no-offload")
LONG: dict[str, Any] = {"prompt": "go", "max_tokens": 2000, "ignore_eos": True}
WORDS = "the king went to the sea and told his brother that the ship had been lost in the night "


def post(server: ServerProcess, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=fields, timeout=300)


def metric(server: ServerProcess, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return float(line.split()[1])


def wait_for(server: ServerProcess, name: str, value: float) -> None:
    deadline = time.monotonic() + 300
    while metric(server, name) != value:
        assert time.monotonic() < deadline, f"{name} is {metric(server, name)}"
        time.sleep(0.05)


def engine_of(server: ServerProcess) -> psutil.Process:
    (engine,) = psutil.Process(server.process.pid).children()
    return engine


def test_a_log_for_machines(servable: Path) -> None:
    """Every line is an object; requests have one, with their id; a second signal ends at once."""
    flags = ("--log-format", "json", "--log_requests", "--enable-chunked-prefill")
    with running_server(str(servable), *SMALL, *flags, "--shutdown-timeout", "300") as server:
        assert server.url.startswith("http://127.0.0.1:")
        headers = {"X-Request-Id": "from-the-client"}
        body = {"prompt": "go", "max_tokens": 2, "ignore_eos": True}
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=300)
        asker = threading.Thread(target=ask_in_vain, args=(server,))
        asker.start()
        wait_for(server, "tierkv_running", 1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert server.process.poll() is None  # it lets the request finish
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 130
        assert time.monotonic() - begun < 20
        asker.join(60)
    entries = [json.loads(line) for line in server.log]
    (entry,) = [e for e in entries if e.get("request_id") == "from-the-client"]
    assert (entry["logger"], entry["status"]) == ("tierkv.access", 200)
    assert (entry["prompt_tokens"], entry["generated_tokens"]) == (2, 2)


def ask_in_vain(server: ServerProcess) -> None:
    """The answer is an error or a closed connection."""
    with contextlib.suppress(httpx.HTTPError):
        assert post(server, **LONG).status_code == 503


def test_an_engine_killed_under_load_and_a_warm_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everyone is answered, the status is not 0, and what the disk holds serves the next one."""
    monkeypatch.setenv("TIERKV_KV_DIR", str(tmp_path / "kv"))
    offload = ("--offload", "cpu=64MiB,nvme=256MiB", "--kv-cache-memory", "128MiB")
    prompt = WORDS * 90
    with running_server("demo", *offload, "--num-threads", "1") as server:
        assert post(server, prompt=prompt, max_tokens=1).status_code == 200
        wait_for(server, "tierkv_offers_waiting", 0)
        wait_for(server, "tierkv_moves_in_flight", 0)
        answers = answers_while_killed(server)
        assert len(answers) == 6
        assert all("the engine process ended" in answer.text for answer in answers)
        assert server.wait() == 1
        assert "tierkv: error: the engine process ended" in "".join(server.log)
    with running_server("demo", *offload, "--num-threads", "1") as server:
        usage = post(server, prompt=prompt, max_tokens=1).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0.9 * usage["prompt_tokens"]


def answers_while_killed(server: ServerProcess) -> list[httpx.Response]:
    """What six clients get when the engine is killed while it serves all of them."""
    answers: list[httpx.Response] = []

    def ask(is_streamed: bool) -> None:
        answers.append(post(server, **LONG, stream=is_streamed))

    clients = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(6)]
    for client in clients:
        client.start()
    wait_for(server, "tierkv_running", 6)
    engine_of(server).kill()
    for client in clients:
        client.join(60)
        assert not client.is_alive()
    return answers
