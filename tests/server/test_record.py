"""`GET /kv/record` and `tierkv trace record` over a real engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_app import PATIENCE_S, LiveApp, live_app

from tierkv.cli.main import main
from tierkv.server.app import AppSettings
from tierkv.sim.trace import TraceRequest
from tierkv.sim.traces import read_trace

KEY, ADMIN = "user-key", "admin-key"
LONG = "a prompt that is longer than four blocks of sixteen tokens each, by a good deal"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def served(servable: Path) -> Iterator[LiveApp]:
    settings = AppSettings(["tiny"], api_key=KEY, admin_api_key=ADMIN, max_sequences=40)
    options: dict[str, Any] = {"num_gpu_blocks": 128, "num_threads": 1, "dtype": "float32"}
    with live_app(servable, settings, **options) as app:
        yield app


def complete(app: LiveApp, prompt: str, **fields: Any) -> None:
    body = {"prompt": prompt, "max_tokens": 5, "ignore_eos": True, **fields}
    response = app.post("completions", **body)
    assert response.status_code == 200, response.text


def start_recording(app: LiveApp) -> httpx.Response:
    return httpx.Client(timeout=PATIENCE_S).send(
        httpx.Request("GET", f"{app.url}/kv/record", headers=HEADERS), stream=True
    )


def until(lines: Iterator[str], count: int) -> list[dict[str, Any]]:
    """Lines up to a mark after so many requests."""
    found: list[dict[str, Any]] = []
    for line in lines:
        found.append(json.loads(line))
        num_requests = sum(each["type"] == "request" for each in found)
        if num_requests >= count and found[-1]["type"] == "mark":
            break
    return found


def test_requests_come_as_they_end(served: LiveApp) -> None:
    response = start_recording(served)
    lines = response.iter_lines()
    assert json.loads(next(lines)) == {"type": "start", "block_size": 16}
    complete(served, LONG, kv_hints={"session_id": "my-session", "turn": "end"})
    complete(served, LONG)
    found = until(lines, 2)
    response.close()
    first, second = (line for line in found if line["type"] == "request")
    assert first["input_tokens"] == len(LONG) and first["output_tokens"] == 5
    assert first["blocks"] == second["blocks"] and len(first["blocks"]) == len(LONG) // 16 * 16
    assert first["stop"] == "end" and first["session"]
    assert found[-1]["dropped"] == 0 and found[-1]["running"] == 0
    text = json.dumps(found)
    assert "my-session" not in text and LONG[:8] not in text


def test_a_reader_that_leaves_makes_room_for_another(served: LiveApp) -> None:
    for _ in range(3):
        deadline = time.monotonic() + PATIENCE_S
        while (response := start_recording(served)).status_code != 200:
            assert response.status_code == 409 and time.monotonic() < deadline
            response.close()
            time.sleep(0.05)
        lines = response.iter_lines()  # when it is gone, the response is closed
        assert '"start"' in next(lines)
        refused = httpx.get(f"{served.url}/kv/record", headers=HEADERS)
        assert refused.status_code == 409 and "is going on" in refused.text
        response.close()


def test_it_is_for_administrators(served: LiveApp) -> None:
    assert served.http.get("/kv/record").status_code == 403
    assert httpx.get(f"{served.url}/kv/record").status_code == 401


def test_a_trace_is_written(served: LiveApp, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    arguments = ["trace", "record", "--url", served.url, "--api-key", ADMIN, "-o", str(path)]
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(main([*arguments, "--duration", "2"])))
    deadline = time.monotonic() + PATIENCE_S
    thread.start()
    while thread.is_alive() and time.monotonic() < deadline:
        complete(served, LONG, kv_hints={"session_id": "s"})
        complete(served, LONG + " and then some more of it, so that there is another block")
        time.sleep(0.1)
    thread.join(PATIENCE_S)
    assert status == [0]
    requests = list(read_trace(path, most_problems=0))
    assert len(requests) >= 2
    check_written(requests)


def check_written(requests: list[TraceRequest]) -> None:
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    short = next(request for request in requests if request.session)
    longer = next(request for request in requests if not request.session)
    assert short.num_blocks == len(LONG) // 16 < longer.num_blocks
    assert longer.block_ids()[: short.num_blocks] == short.block_ids()
    assert max(longer.block_ids()) < 100, "ids are numbered anew"
    assert short.output_tokens == 5
