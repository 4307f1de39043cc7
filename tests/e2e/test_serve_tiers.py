"""`tierkv serve` with default options: prompts outlive the server, servers live side by side."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from servable import ServerProcess, running_server

from tierkv.storage.lock import holder

WORDS = "the king went to the sea and told his brother that the ship had been lost in the night "


@pytest.fixture
def kv_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the servers of a test keep blocks."""
    monkeypatch.setenv("TIERKV_KV_DIR", str(tmp_path / "kv"))
    return tmp_path / "kv"


def ask(server: ServerProcess, prompt: str) -> tuple[str, int, int]:
    """The demo's continuation; the prompt's tokens, and how many were cached."""
    reply: Any = server.client().completions.create(
        model="demo", prompt=prompt, max_tokens=24, temperature=0
    )
    usage = reply.usage
    return reply.choices[0].text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def stop(server: ServerProcess) -> str:
    """SIGTERM; what the server printed."""
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    log = "".join(server.log)
    assert "Traceback" not in log
    return log


def long_prompt() -> str:
    """Some 2,200 tokens with a sure continuation: cached or not, the demo's bfloat16 logits differ
    in the last bits."""
    return WORDS * 90 + "the king went to the sea and told"


def engine_of(server: ServerProcess) -> psutil.Process:
    (engine,) = psutil.Process(server.process.pid).children()
    return engine


def store_below(path: Path) -> Path:
    (found,) = [child for child in path.iterdir() if child.is_dir()]
    return found


def test_a_prompt_outlives_the_server(kv_directory: Path) -> None:
    with running_server("demo") as server:
        text, num_tokens, num_cached = ask(server, long_prompt())
        assert num_tokens >= 1500 and num_cached == 0
        engine = engine_of(server)
        # A service manager signals every process; the engine lets its front end decide.
        engine.terminate()
        time.sleep(0.2)
        stop(server)
        assert not engine.is_running()
    assert holder(store_below(kv_directory)) == "nobody"
    with running_server("demo") as server:
        again = ask(server, long_prompt())
        assert (again[0], again[1]) == (text, num_tokens)
        assert again[2] > 1000
        stop(server)


@pytest.mark.full
def test_servers_beside_one_another(kv_directory: Path) -> None:
    """The second goes without the store, and says so, unless it was told to have it."""
    with running_server("demo") as first:
        engine = engine_of(first)
        store = store_below(kv_directory)
        assert holder(store) == str(engine.pid)
        third = ServerProcess("demo", "--offload", "cpu,nvme")
        with running_server("demo") as second:
            text, _, _ = ask(second, "once upon a time")
            assert text == ask(first, "once upon a time")[0]
            log = stop(second)
        assert f"process {engine.pid} is using it" in log and "nvme_path" in log
        try:
            assert third.wait(300) == 2
        finally:
            third.close()
        log = "".join(third.log)
        assert "tierkv: error: --nvme-path" in log and f"process {engine.pid} is using it" in log
        assert "Traceback" not in log and "ready at" not in log
        assert holder(store) == str(engine.pid)
        stop(first)
    assert holder(store) == "nobody"
