"""What the server refuses, and what it gives up: a full queue, time that is over, clients gone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from live_app import LiveApp, served
from starlette.requests import Request

from tierkv.server.app import AppSettings
from tierkv.server.context import LATE_S, ServerContext


def long_body(app: LiveApp, **fields: Any) -> dict[str, Any]:
    length = app.engine.info.max_model_len - 20
    return {"prompt": "go", "max_tokens": length, "ignore_eos": True, **fields}


@contextmanager
def limited(app: LiveApp, **settings: Any) -> Iterator[LiveApp]:
    """A second application over the same engine."""
    with served(app.engine, AppSettings(["tiny"], **settings)) as other:
        yield other


@contextmanager
def stream_under_way(app: LiveApp, **fields: Any) -> Iterator[Iterator[str]]:
    """The lines that are still to come of a stream that has begun."""
    body = long_body(app, stream=True, **fields)
    with app.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines  # the response is closed with its iterator


# -- a full queue ----------------------------------------------------------------------------------


def test_a_full_queue_is_503_with_retry_after(app: LiveApp) -> None:
    with limited(app, max_sequences=3) as small:
        with stream_under_way(small, n=2):
            for is_streamed in (False, True):
                response = small.post("completions", prompt="x", n=2, stream=is_streamed)
                assert response.status_code == 503
                assert int(response.headers["retry-after"]) >= 1
                error = response.json()["error"]
                assert error["code"] == "queue_full"
                assert "2 of 3 sequences are in flight" in error["message"]
            assert small.post("completions", prompt="x", max_tokens=1).status_code == 200
        small.wait_for(lambda found: found["running"] == 0)
        assert small.post("completions", prompt="x", n=2, max_tokens=1).status_code == 200


def test_openai_s_client_tries_again_until_there_is_room(app: LiveApp) -> None:
    with limited(app, max_sequences=1) as small:
        client = openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=9)
        leaving = threading.Event()

        def occupy() -> None:
            with stream_under_way(small):
                leaving.wait(60)

        occupier = threading.Thread(target=occupy)
        occupier.start()
        small.wait_for(lambda found: found["running"] == 1)
        threading.Timer(0.5, leaving.set).start()
        reply = client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert reply.choices[0].finish_reason == "length"
        occupier.join()
        client.close()


# -- time that is over -----------------------------------------------------------------------------


def test_a_request_whose_time_is_over_is_504_and_aborted(app: LiveApp) -> None:
    before = app.metrics()["finished_abort"]
    with limited(app, request_timeout=0.4) as hasty:
        begun = time.monotonic()
        response = hasty.post("completions", **long_body(hasty, n=2))
        assert response.status_code == 504
        assert time.monotonic() - begun < 10
        assert response.json()["error"]["code"] == "request_timeout"
        after = hasty.wait_for(lambda found: found["running"] == 0)
        assert after["finished_abort"] == before + 2
        assert after["gpu_blocks_used"] == 0
        assert "tierkv_request_timeouts_total 1.0" in hasty.http.get("/metrics").text


def test_a_stream_whose_time_is_over_ends_with_an_error_event(app: LiveApp) -> None:
    with limited(app, request_timeout=0.4) as hasty:
        with stream_under_way(hasty) as lines:
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        hasty.wait_for(lambda found: found["running"] == 0)
        with pytest.raises(openai.APIError, match=r"not answered within 0.4 s"):
            list(
                hasty.openai.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "go"}],
                    max_completion_tokens=hasty.engine.info.max_model_len - 20,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )


class Endless:
    """A reply that never ends; notes when it is given up."""

    num_sequences = 2

    def __init__(self) -> None:
        self.is_over = False

    async def body(self) -> dict[str, Any]:
        return {}

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"more"
        finally:
            self.is_over = True

    def error_event(self, error: Exception) -> bytes:
        return f"error: {error}".encode()


class NoBody:
    """A body without names of its own."""

    def public_name(self, field: str) -> str:
        return field


def test_a_client_that_does_not_read_holds_nothing_beyond_its_time(app: LiveApp) -> None:
    """The sender waits for it, and nobody asks for the next event."""
    former, reply = app.engine.make_watch, Endless()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def stall() -> list[Any]:
        context = ServerContext(app.engine, AppSettings(["tiny"], request_timeout=0.2))
        request = Request({"type": "http", "headers": []}, receive)
        response: Any = await context.answer(request, NoBody(), lambda: reply, stream=True)
        read = [await anext(response.body_iterator), await anext(response.body_iterator)]
        before = context.num_sequences
        await asyncio.sleep(0.2 + LATE_S + 0.5)
        assert reply.is_over and (before, context.num_sequences) == (2, 0)
        return read + [event async for event in response.body_iterator]

    try:
        assert asyncio.run(stall()) == [b"more", b"more", b"error: not read in time, and aborted"]
    finally:
        app.engine.make_watch = former


def test_a_quick_request_has_time_enough(app: LiveApp) -> None:
    with limited(app, request_timeout=60) as patient:
        for is_streamed in (False, True):
            response = patient.post("completions", prompt="x", max_tokens=2, stream=is_streamed)
            assert response.status_code == 200
        assert "[DONE]" in response.text


# -- pages elsewhere -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 415), ("same-site", 415), ("same-origin", 200), ("", 200)]
)
def test_a_page_elsewhere_cannot_send_what_browsers_do_not_ask_about(
    app: LiveApp, site: str, status: int
) -> None:
    """They send a body without a type unasked, and one of JSON only where that is allowed."""
    raw = json.dumps({"prompt": "x", "max_tokens": 1})
    headers = {"Sec-Fetch-Site": site} if site else {}
    response = app.http.post("/v1/completions", content=raw, headers=headers)
    assert response.status_code == status
    headers["Content-Type"] = "application/json"
    assert app.http.post("/v1/completions", content=raw, headers=headers).status_code == 200


# -- clients that leave ----------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_blocks_within_a_second(app: LiveApp) -> None:
    """The best of three: this machine may do something else for a second."""
    times = []
    for _ in range(3):
        with stream_under_way(app, n=2):
            assert app.metrics()["running"] == 2
        left = time.monotonic()
        app.wait_for(lambda found: found["running"] == 0 == found["gpu_blocks_used"])
        times.append(time.monotonic() - left)
        text = httpx.get(f"{app.url}/metrics").text
        assert "\ntierkv_running 0.0\n" in text and "\ntierkv_sequences_in_flight 0.0\n" in text
    assert min(times) < 1
