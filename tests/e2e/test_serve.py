"""`tierkv serve` as users run it: a process, the `openai` client, signals, and a dead engine."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from servable import ServerProcess, running_server

MESSAGES: Any = [{"role": "user", "content": "hello"}]
SMALL = ("--num-gpu-blocks", "256", "--num-threads", "1", "--shutdown-timeout", "60")


@pytest.fixture
def configured(servable: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server started from a YAML file, with a flag that overrides it."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"model: {servable}\nserved-model-name: [tiny]\napi_key: secret\nmax_model_len: 100\n"
        f"chat-template: {template}\nnum-gpu-blocks: 256\nnum-threads: 1\n"
        "shutdown-timeout: 60\n"
    )
    with running_server("--config", str(config), "--max-model-len", "512") as server:
        yield server


def engine_of(server: ServerProcess) -> psutil.Process:
    (engine,) = psutil.Process(server.process.pid).children()
    return engine


def test_a_server_from_yaml_serves_and_stops_cleanly(configured: ServerProcess) -> None:
    client = configured.client("secret")
    (card,) = client.models.list().data
    assert (card.id, card.model_dump()["max_model_len"]) == ("tiny", 512)
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len("hello")  # the template of the YAML file
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    check_that_the_port_is_taken(configured.url.rpartition(":")[2])
    engine = engine_of(configured)
    stop_during_a_stream(configured, signal.SIGTERM, "tiny", "secret")
    assert not engine.is_running()


def check_that_the_port_is_taken(port: str) -> None:
    second = ServerProcess("no-model-is-loaded", "--port", port)
    try:
        assert second.wait(300) == 2
        assert f"--port {port}: cannot be used" in "".join(second.log)
        assert "loading" not in "".join(second.log)
    finally:
        second.close()


def stop_during_a_stream(
    server: ServerProcess, number: signal.Signals, model: str, api_key: str
) -> None:
    """What runs is finished, nothing is printed, the status is 0."""
    with server.client(api_key).completions.create(
        model=model, prompt="go", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(number)
        *_, last = chunks
    assert last.choices[0].finish_reason == "length"
    assert server.wait() == 0
    assert "Traceback" not in "".join(server.log)


def test_what_outlasts_the_shutdown_timeout_is_aborted(servable: Path) -> None:
    """Its client gets the end of the stream, not a broken connection."""
    quick = ("--num-gpu-blocks", "256", "--num-threads", "1", "--shutdown-timeout", "0")
    with running_server(str(servable), *quick) as server:
        with server.client().completions.create(
            model=str(servable),
            prompt="go",
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            chunks = iter(stream)
            next(chunks)
            server.process.send_signal(signal.SIGTERM)
            *_, last = chunks
        assert last.choices[0].finish_reason == "abort"  # vLLM's word; OpenAI has none
        assert server.wait() == 0
        assert "Traceback" not in "".join(server.log)


@pytest.mark.full
def test_ctrl_c_stops_cleanly_and_a_killed_server_leaves_nothing(servable: Path) -> None:
    with running_server(str(servable), *SMALL) as server:
        stop_during_a_stream(server, signal.SIGINT, str(servable), "none")
    with running_server(str(servable), *SMALL) as server:
        engine = engine_of(server)
        server.process.kill()
        server.wait()
        engine.wait(120)


def test_a_dead_engine_is_503_and_ends_the_server(servable: Path) -> None:
    with running_server(str(servable), *SMALL) as server:
        client = server.client()
        outcome: list[Exception] = []

        def ask() -> None:
            try:
                client.completions.create(
                    model=str(servable),
                    prompt="go",
                    max_tokens=2000,
                    extra_body={"ignore_eos": True},
                )
            except openai.APIError as error:
                outcome.append(error)

        asker = threading.Thread(target=ask)
        asker.start()
        engine = engine_of(server)
        while not asker_is_served(engine):
            assert asker.is_alive()
        engine.kill()
        asker.join(300)
        assert not asker.is_alive()
        (error,) = outcome
        assert isinstance(error, openai.InternalServerError)
        assert error.status_code == 503
        assert server.wait() == 1
        assert "the engine process ended" in "".join(server.log)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def asker_is_served(engine: psutil.Process) -> bool:
    """The engine computes: it was idle before."""
    return engine.cpu_percent(0.1) > 20


def test_a_model_that_cannot_be_loaded_is_status_2(tmp_path: Path) -> None:
    server = ServerProcess(str(tmp_path / "nothing"))
    try:
        assert server.wait(300) == 2
        log = "".join(server.log)
        assert "tierkv: error: --model" in log
        assert "ready at" not in log
    finally:
        server.close()


def test_the_server_extra_is_named_when_missing(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    program = "from tierkv.cli.main import main; import sys; sys.exit(main(['serve']))"
    done = subprocess.run(
        ["env", f"PYTHONPATH={tmp_path}", sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'tierkv[server]'" in done.stderr


def test_the_demo_answers_in_words() -> None:
    with running_server("demo", "--kv-cache-memory", "64MiB", "--num-threads", "1") as server:
        question: Any = [{"role": "user", "content": "Tell me a story."}]
        ask: Any = {"model": "demo", "messages": question, "max_tokens": 48, "temperature": 0}
        reply = server.client().chat.completions.create(**ask)
        text = reply.choices[0].message.content
        assert text is not None
        assert len(re.findall(r"[A-Za-z]{2,}", text)) >= 5
        assert "\N{REPLACEMENT CHARACTER}" not in text
        chunks = server.client().chat.completions.create(**ask, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
