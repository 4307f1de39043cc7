"""Request ids, log lines and what becomes of requests when the engine dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_app import LiveApp, live_app, served

from tierkv.server.app import AppSettings
from tierkv.server.protocol import CompletionBody
from tierkv.server.records import request_id_from

QUICK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}


# -- request ids -----------------------------------------------------------------------------------


def test_a_sane_id_comes_back(app: LiveApp) -> None:
    headers = {"X-Request-Id": "trace-7f.1:a/b"}
    for body in (QUICK, {**QUICK, "stream": True}, {"prompt": ""}):
        response = app.http.post("/v1/completions", json=body, headers=headers)
        assert response.headers["x-request-id"] == "trace-7f.1:a/b"
    assert app.http.get("/nothing", headers=headers).headers["x-request-id"] == "trace-7f.1:a/b"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "-x", "a\nb", 'a"b', "ä"])
def test_any_other_is_replaced(given: str | None) -> None:
    made_up = request_id_from(given)
    assert made_up != given and made_up != request_id_from(given)
    assert request_id_from(made_up) == made_up


def test_ids_are_made_up_and_differ(app: LiveApp) -> None:
    first, second = (httpx.get(f"{app.url}/health").headers["x-request-id"] for _ in range(2))
    assert first and second and first != second


def test_a_bug_has_its_id_too(app: LiveApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CompletionBody, "prompts", fail)
    response = app.http.post("/v1/completions", json=QUICK, headers={"X-Request-Id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    text = httpx.get(f"{app.url}/metrics").text
    assert 'route="/v1/completions",status="500"' in text


# -- log lines -------------------------------------------------------------------------------------


def fields_logged(
    app: LiveApp, caplog: pytest.LogCaptureFixture, act: Callable[[LiveApp], Any]
) -> list[dict[str, Any]]:
    """The fields of each request's line, for what `act` does with an application that logs."""
    with (
        caplog.at_level(logging.INFO, "tierkv.access"),
        served(app.engine, AppSettings(["tiny"], log_requests=True)) as logging_app,
    ):
        act(logging_app)
    return [r.fields for r in caplog.records if r.name == "tierkv.access"]  # type: ignore[attr-defined]


def test_a_request_is_one_line(app: LiveApp, caplog: pytest.LogCaptureFixture) -> None:
    def act(logging_app: LiveApp) -> None:
        headers = {"X-Request-Id": "mine"}
        body = {**QUICK, "n": 2, "stream": True}
        logging_app.http.post("/v1/completions", json=body, headers=headers)
        logging_app.http.get("/health")
        logging_app.http.get("/metrics")
        logging_app.post("completions", prompt="")

    good, bad = fields_logged(app, caplog, act)
    assert good["request_id"] == "mine"
    assert (good["method"], good["path"], good["status"]) == ("POST", "/v1/completions", 200)
    assert (good["prompt_tokens"], good["generated_tokens"]) == (5, 6)
    assert good["finish"] == "length,length"
    assert 0 < good["first_token_s"] <= good["duration_s"]
    assert bad["status"] == 400 and "prompt_tokens" not in bad


def test_nothing_is_logged_unless_asked(app: LiveApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        app.post("completions", **QUICK)
    assert not [r for r in caplog.records if r.name == "tierkv.access"]


# -- a dead engine ---------------------------------------------------------------------------------


def test_a_killed_engine_answers_everyone(servable: Path) -> None:
    """Streams and whole replies, running and waiting: an error each, and no one hangs."""
    options: dict[str, Any] = {"num_gpu_blocks": 256, "num_threads": 1, "max_num_seqs": 4}
    with live_app(servable, AppSettings(["tiny"]), **options) as app:
        body = {"prompt": "go", "max_tokens": app.engine.info.max_model_len - 20}
        endings: list[str] = []

        def ask(is_streamed: bool) -> None:
            response = app.post("completions", **body, ignore_eos=True, stream=is_streamed)
            endings.append(f"{response.status_code} {response.text[-200:]}")

        clients = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(8)]
        for client in clients:
            client.start()
        app.wait_for(lambda found: found["running"] == 4 == found["waiting"])
        app.engine._client.process.kill()
        for client in clients:
            client.join(60)
            assert not client.is_alive()
        assert len(endings) == 8
        assert all("the engine process ended (SIGKILL)" in ending for ending in endings)
        assert sum(ending.startswith("503") for ending in endings) >= 4  # who did not stream
        health = httpx.get(f"{app.url}/health")
        assert health.status_code == 503
        assert health.json()["error"]["code"] == "engine_dead"
        text = httpx.get(f"{app.url}/metrics").text
        assert "\ntierkv_engine_up 0.0\n" in text
        assert "\ntierkv_sequences_in_flight 0.0\n" in text
        assert app.post("completions", **QUICK).status_code == 503
