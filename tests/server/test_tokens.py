"""`/tokenize`, `/detokenize`, and what else the server says of itself in vLLM's words."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
from live_app import LiveApp

MESSAGES = [{"role": "user", "content": "hello"}]


def tokenize(app: LiveApp, **fields: Any) -> dict[str, Any]:
    response = app.http.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_prompt_becomes_the_tokens_that_are_computed(app: LiveApp) -> None:
    found = tokenize(app, prompt="hello", model="tiny")
    assert app.engine.tokenizer is not None
    assert found["tokens"] == app.engine.tokenizer.encode("hello")
    assert (found["count"], found["max_model_len"]) == (5, app.engine.info.max_model_len)
    assert found["token_strs"] is None
    named = tokenize(app, prompt="h<|end|>", return_token_strs=True, add_special_tokens=False)
    assert named["token_strs"] == ["h", "<|end|>"]


def test_messages_become_the_tokens_that_are_computed(app: LiveApp) -> None:
    whole = app.post("chat/completions", messages=MESSAGES, max_tokens=1).json()
    found = tokenize(app, messages=MESSAGES)
    assert found["count"] == whole["usage"]["prompt_tokens"] == 8
    assert tokenize(app, messages=MESSAGES, add_generation_prompt=False)["count"] == 7
    begun = [*MESSAGES, {"role": "assistant", "content": "yes"}]
    kept: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert tokenize(app, messages=begun, **kept)["count"] == 8 + len("yes")
    opened = tokenize(app, messages=MESSAGES, chat_template_kwargs={"opening": "well"})
    assert opened["count"] == 8 + len("well")


@pytest.mark.parametrize("text", ["hello", "", "\u00e9\n\x00<|user|>", "x" * 3000])
def test_tokens_become_the_text_that_they_came_from(app: LiveApp, text: str) -> None:
    tokens = tokenize(app, prompt=text)["tokens"]
    response = app.http.post("/detokenize", json={"tokens": tokens})
    assert response.json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        (
            "/tokenize",
            {"messages": MESSAGES, "add_special_tokens": True},
            400,
            "add_special_tokens",
        ),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue"),
        ("/tokenize", {"prompt": "x", "promt": 1}, 400, "promt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x" * (2**20 + 1)}, 400, "prompt"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, "x"]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 2**70]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
def test_bad_requests_name_the_field(
    app: LiveApp, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = app.http.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_the_key_is_checked(app: LiveApp) -> None:
    for path in ("/tokenize", "/detokenize", "/reset_prefix_cache"):
        assert httpx.post(f"{app.url}{path}", json={}).status_code == 401


def test_ping_and_load_need_no_key(app: LiveApp) -> None:
    assert httpx.get(f"{app.url}/ping").status_code == 200
    assert httpx.post(f"{app.url}/ping").status_code == 200
    assert httpx.get(f"{app.url}/load").json() == {"server_load": 0}


def test_the_cache_is_reset_when_nobody_uses_it(app: LiveApp) -> None:
    body = {"prompt": "x" * 64, "max_tokens": 1, "ignore_eos": True}
    app.post("completions", **body)
    limit = app.engine.info.max_model_len - 100
    running = threading.Event()

    def run() -> None:
        with app.http.stream(
            "POST", "/v1/completions", json={**body, "max_tokens": limit, "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            running.set()
            done.wait(60)

    done = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert running.wait(60)
        assert app.http.get("/load").json() == {"server_load": 1}
        refused = app.http.post("/reset_prefix_cache")
        assert refused.status_code == 409
        assert "1 sequences are in flight" in refused.json()["error"]["message"]
    finally:
        done.set()
        thread.join()
    app.wait_for(lambda found: found["running"] == 0)
    assert app.http.post("/reset_prefix_cache").status_code == 200
    usage = app.post("completions", **body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
