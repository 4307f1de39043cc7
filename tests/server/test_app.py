"""The HTTP API over a real engine: answers, streams, errors, disconnects."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import openai
import pytest
from live_app import LiveApp

from tierkv.server.protocol import CompletionBody

MESSAGES: Any = [{"role": "user", "content": "hello"}]
GREEDY: Any = {"model": "tiny", "temperature": 0}
TOOLS: Any = [{"type": "function", "function": {"name": "f"}}]


def complete(app: LiveApp, **fields: Any) -> dict[str, Any]:
    response = app.post("completions", **{**GREEDY, "prompt": "hello", **fields})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def chat(app: LiveApp, **fields: Any) -> dict[str, Any]:
    response = app.post("chat/completions", **{**GREEDY, "messages": MESSAGES, **fields})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def events(app: LiveApp, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    body = {**GREEDY, **fields, "stream": True}
    with app.http.stream("POST", f"/v1/{path}", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# -- what it is ------------------------------------------------------------------------------------


def test_health_and_version_need_no_key(app: LiveApp) -> None:
    assert httpx.get(f"{app.url}/health").status_code == 200
    assert httpx.get(f"{app.url}/version").json()["version"]


def test_models_are_listed_and_found_by_name(app: LiveApp) -> None:
    cards = app.openai.models.list().data
    assert [card.id for card in cards] == ["tiny", "org/also-tiny"]
    card = app.openai.models.retrieve("org/also-tiny")
    assert card.id == "org/also-tiny"
    assert card.model_dump()["max_model_len"] == app.engine.info.max_model_len


def test_the_key_is_checked(app: LiveApp) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic test-key"}):
        response = httpx.get(f"{app.url}/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    stranger = openai.OpenAI(base_url=f"{app.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="tiny", prompt="x")


# -- completions -----------------------------------------------------------------------------------


def test_a_completion_by_the_openai_client(app: LiveApp) -> None:
    reply = app.openai.completions.create(prompt="hello", max_tokens=7, **GREEDY)
    (choice,) = reply.choices
    assert (reply.object, reply.model) == ("text_completion", "tiny")
    assert choice.text and choice.finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 7)
    assert reply.usage.total_tokens == 12


def test_text_and_token_ids_are_the_same_prompt(app: LiveApp) -> None:
    tokenizer = app.engine.tokenizer
    assert tokenizer is not None
    text = complete(app)["choices"][0]["text"]
    assert complete(app, prompt=tokenizer.encode("hello"))["choices"][0]["text"] == text


def test_several_prompts_and_samples_are_numbered(app: LiveApp) -> None:
    reply = complete(app, prompt=["one", "two", "three"], n=2, max_tokens=3, temperature=1.0)
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    assert reply["usage"]["completion_tokens"] == 18
    assert reply["usage"]["prompt_tokens"] == 3 + 3 + 5
    one = complete(app, prompt="two", max_tokens=9)["choices"][0]["text"]
    both = complete(app, prompt=[[1, 2], [1, 3]], max_tokens=2)
    assert len(both["choices"]) == 2
    assert complete(app, prompt=["one", "two"], max_tokens=9)["choices"][1]["text"] == one


def test_cached_tokens_are_reported(app: LiveApp) -> None:
    prompt = "a prompt that is longer than two blocks of sixteen tokens each"
    complete(app, prompt=prompt, max_tokens=1)
    usage = complete(app, prompt=prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 48
    salted = complete(app, prompt=prompt, max_tokens=1, cache_salt="other")["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_legacy_logprobs(app: LiveApp) -> None:
    logprobs = complete(app, max_tokens=4, logprobs=2)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 4
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert value <= 0
        assert top[token] == pytest.approx(max(top.values()))
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(4)]


def test_echo_scores_the_prompt(app: LiveApp) -> None:
    choice = complete(app, echo=True, logprobs=1, max_tokens=2)["choices"][0]
    plain = complete(app, max_tokens=2)["choices"][0]["text"]
    assert choice["text"] == "hello" + plain
    assert choice["logprobs"]["tokens"][:5] == list("hello")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])


def test_echo_alone_generates_nothing(app: LiveApp) -> None:
    reply = complete(app, echo=True, logprobs=1, max_tokens=0)
    choice = reply["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"]["tokens"] == list("hello")
    assert reply["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_as_in_vllm(app: LiveApp) -> None:
    choice = complete(app, prompt_logprobs=1, max_tokens=1)["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == 4
    assert {"logprob", "rank", "decoded_token"} <= set(next(iter(others[0].values())))


def test_stop_strings_and_ids(app: LiveApp) -> None:
    # One character per token here, as far as the model's bytes are characters.
    full = complete(app, max_tokens=40)["choices"][0]["text"]
    stop = next(c for c in full[2:] if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    cut = complete(app, max_tokens=40, stop=stop)["choices"][0]
    assert cut["text"] == full[: full.index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    kept = complete(app, max_tokens=40, stop=[stop], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == full[: full.index(stop) + 1]


def test_a_seed_makes_samples_reproducible(app: LiveApp) -> None:
    texts = {
        complete(app, temperature=1.0, seed=5, max_tokens=12)["choices"][0]["text"]
        for _ in range(3)
    }
    assert len(texts) == 1


def test_a_bias_decides(app: LiveApp) -> None:
    reply = complete(app, max_tokens=3, logit_bias={"33": 100})
    assert reply["choices"][0]["text"] == 3 * reply["choices"][0]["text"][0]


def test_a_completion_stream_is_the_completion(app: LiveApp) -> None:
    fields = {"prompt": ["hello", "you"], "n": 2, "max_tokens": 9, "logprobs": 1}
    whole = complete(app, **fields)
    chunks = events(app, "completions", **fields, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        tokens = [
            token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]
        ]
        assert tokens == choice["logprobs"]["tokens"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == ["length"]


def test_an_echo_stream_begins_with_the_prompt(app: LiveApp) -> None:
    chunks = events(app, "completions", prompt="hello", echo=True, max_tokens=4)
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == complete(app, echo=True, max_tokens=4)["choices"][0]["text"]
    assert text.startswith("hello")


# -- chat ------------------------------------------------------------------------------------------


def test_a_chat_uses_the_template(app: LiveApp) -> None:
    reply = chat(app, max_tokens=6)
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"]["role"] == "assistant"
    # <|user|> h e l l o <|end|> <|assistant|>
    assert reply["usage"]["prompt_tokens"] == 8
    prompt = "<|user|>hello<|end|><|assistant|>"
    same = complete(app, prompt=prompt, max_tokens=6)["choices"][0]["text"]
    assert reply["choices"][0]["message"]["content"] == same


def test_chat_parts_and_template_options(app: LiveApp) -> None:
    parts: Any = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
        }
    ]
    assert chat(app, messages=parts, max_tokens=1)["usage"]["prompt_tokens"] == 9
    longer = chat(app, chat_template_kwargs={"opening": "well"}, max_tokens=1)
    assert longer["usage"]["prompt_tokens"] == 12
    bare = chat(app, add_generation_prompt=False, max_tokens=1)
    assert bare["usage"]["prompt_tokens"] == 7


def test_chat_logprobs(app: LiveApp) -> None:
    content = chat(app, max_tokens=3, logprobs=True, top_logprobs=4)["choices"][0]["logprobs"][
        "content"
    ]
    assert len(content) == 3
    for entry in content:
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 4 and tops == sorted(tops, reverse=True)
        assert entry["logprob"] == tops[0]
    bare = chat(app, max_tokens=3, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[], [], []]


def test_a_chat_stream_by_the_openai_client(app: LiveApp) -> None:
    whole = app.openai.chat.completions.create(
        messages=MESSAGES, max_completion_tokens=12, **GREEDY
    )
    stream = app.openai.chat.completions.create(
        messages=MESSAGES,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_streams_of_several_samples(app: LiveApp) -> None:
    chunks = events(app, "chat/completions", messages=MESSAGES, n=3, max_tokens=4, temperature=1.0)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert {choice["index"] for choice in choices} == {0, 1, 2}
    roles = [choice["index"] for choice in choices if choice["delta"].get("role")]
    assert roles == [0, 1, 2]
    assert sum(choice["finish_reason"] is not None for choice in choices) == 3


# -- errors ----------------------------------------------------------------------------------------


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


BAD_BODIES: list[tuple[str, Any, int, str | None]] = [
    ("completions", b"{", 400, "body"),
    ("completions", b"\xff\xfe", 400, "body"),
    ("completions", b"", 400, "body"),
    ("completions", b"[1]", 400, "body"),
    ("completions", b"[" * 100_000, 400, "body"),
    ("completions", b'{"prompt": "x", "temperature": NaN}', 400, "body"),
    ("completions", b'{"prompt": "\\ud800"}', 400, "body"),
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": ""}, 400, "prompt"),
    ("completions", {"prompt": []}, 400, "prompt"),
    ("completions", {"prompt": ["x", 1]}, 400, "prompt"),
    ("completions", {"prompt": [1, 99_999]}, 400, "prompt"),
    ("completions", {"prompt": [1, -1]}, 400, "prompt"),
    ("completions", {"prompt": [1, 2**70]}, 400, "prompt"),
    ("completions", {"prompt": "x" * 5000}, 400, "prompt"),
    ("completions", {"prompt": "x", "model": "other"}, 404, "model"),
    ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
    ("completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ("completions", {"prompt": "x", "top_p": 0}, 400, "top_p"),
    ("completions", {"prompt": "x", "n": 0}, 400, "n"),
    ("completions", {"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"prompt": "x", "min_tokens": 20}, 400, "min_tokens"),
    ("completions", {"prompt": "x", "logprobs": 5000}, 400, "logprobs"),
    ("completions", {"prompt": "x", "stop": [1]}, 400, "stop[0]"),
    ("completions", {"prompt": "x", "stop": ""}, 400, "stop"),
    ("completions", {"prompt": "x", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "logit_bias": {"9999": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "best_of": 1, "n": 2}, 400, "best_of"),
    ("completions", {"prompt": "x", "best_of": 3, "stream": True}, 400, "best_of"),
    ("completions", {"prompt": "x", "length_penalty": 1.0}, 400, "length_penalty"),
    ("completions", {"prompt": "x", "allowed_token_ids": [9999]}, 400, "allowed_token_ids"),
    ("completions", {"prompt": "x", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    ("completions", {"prompt": "x", "guided_regex": "(a"}, 400, "guided_regex"),
    ("completions", {"prompt": "x", "guided_json": "{"}, 400, "guided_json"),
    ("completions", {"prompt": "x", "guided_choice": []}, 400, "guided_choice"),
    (
        "completions",
        {"prompt": "x", "guided_regex": "a", "guided_choice": ["a"]},
        400,
        "guided_choice",
    ),
    (
        "completions",
        {"prompt": "x", "structured_outputs": {"grammar": "start: x"}},
        400,
        "structured_outputs.grammar",
    ),
    (
        "completions",
        {"prompt": "x", "structured_outputs": {"structural_tag": "{}"}},
        400,
        "structured_outputs.structural_tag",
    ),
    ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ("completions", {"prompt": "x", "tempratur": 1}, 400, "tempratur"),
    ("completions", {"prompt": "x", "stream_options": {"usage": 1}}, 400, "stream_options.usage"),
    ("completions", {"prompt": "x", "priority": "high"}, 400, "priority"),
    ("chat/completions", {}, 400, "messages"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": "hi"}, 400, "messages"),
    ("chat/completions", {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ("chat/completions", {"messages": [{"role": "alien", "content": "x"}]}, 400, "messages"),
    ("chat/completions", {"messages": [*MESSAGES * 600]}, 400, "messages"),
    ("chat/completions", {"messages": MESSAGES, "tools": [{}]}, 400, "tools[0].type"),
    ("chat/completions", {"messages": MESSAGES, "tools": TOOLS}, 400, "tool_choice"),
    ("chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, 400, "tool_choice"),
    (
        "chat/completions",
        {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "sometimes"},
        400,
        "tool_choice",
    ),
    (
        "chat/completions",
        {"messages": MESSAGES, "response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
    ),
    (
        "chat/completions",
        {"messages": MESSAGES, "response_format": schema_format({"type": "objec"})},
        400,
        "response_format.json_schema.schema",
    ),
    ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs"),
    (
        "chat/completions",
        {"messages": MESSAGES, "max_completion_tokens": 0},
        400,
        "max_completion_tokens",
    ),
    (
        "chat/completions",
        {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}},
        400,
        "chat_template_kwargs",
    ),
    ("nothing", {}, 404, None),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "param"), BAD_BODIES)
def test_bad_requests_name_the_field(
    app: LiveApp, path: str, body: Any, status: int, param: str | None, is_streamed: bool
) -> None:
    if isinstance(body, dict):
        body = json.dumps({**body, "stream": True} if is_streamed else body).encode()
    response = app.http.post(f"/v1/{path}", content=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"] and error["type"] == "invalid_request_error"


def test_stream_options_need_a_stream(app: LiveApp) -> None:
    response = app.post("completions", prompt="x", stream_options={"include_usage": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"


def test_a_bug_is_500_and_ends_the_connection(
    app: LiveApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CompletionBody, "prompts", fail)
    response = app.post("completions", prompt="x")
    assert response.status_code == 500
    assert response.headers["connection"] == "close"
    monkeypatch.undo()
    assert app.post("completions", prompt="x", max_tokens=1).status_code == 200


def test_the_engine_keeps_serving_after_bad_requests(app: LiveApp) -> None:
    app.post("completions", prompt="x" * 5000)
    assert complete(app, max_tokens=1)["choices"][0]["finish_reason"] == "length"


def test_the_wrong_method_is_an_error_of_the_same_form(app: LiveApp) -> None:
    response = app.http.get("/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["message"]


def test_neutral_values_of_fields_that_are_not_served_pass(app: LiveApp) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
    }
    assert chat(app, max_tokens=1, user="me", metadata=None, **neutral)["choices"]


def test_more_sequences_than_can_ever_be_in_flight_are_400(app: LiveApp) -> None:
    for fields in ({"prompt": "x", "n": 13}, {"prompt": ["x"] * 7, "n": 2}):
        response = app.post("completions", **fields, max_tokens=1)
        assert response.status_code == 400
        assert "retry-after" not in response.headers
        error = response.json()["error"]
        assert error["param"] == "n" and "at most 12" in error["message"]


# -- clients that leave ----------------------------------------------------------------------------


def long_request(app: LiveApp, *, stream: bool) -> dict[str, Any]:
    length = app.engine.info.max_model_len - 20
    return {"prompt": "go", "max_tokens": length, "ignore_eos": True, "stream": stream, "n": 2}


def test_leaving_a_stream_aborts_it(app: LiveApp) -> None:
    before = app.metrics()["finished_abort"]
    with app.http.stream(
        "POST", "/v1/completions", json=long_request(app, stream=True)
    ) as response:
        next(response.iter_lines())
    after = app.wait_for(lambda found: found["running"] == 0)
    assert after["finished_abort"] == before + 2


def test_leaving_before_the_reply_aborts_it(app: LiveApp) -> None:
    before = app.metrics()["finished_abort"]
    request = app.http.build_request(
        "POST", "/v1/completions", json=long_request(app, stream=False)
    )
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode())
        connection.sendall(request.read())
        app.wait_for(lambda found: found["running"] == 2)
    after = app.wait_for(lambda found: found["running"] == 0)
    assert after["finished_abort"] == before + 2


def test_many_clients_at_once_get_what_they_get_alone(app: LiveApp) -> None:
    prompts = [f"client number {i}" for i in range(8)]
    alone = [
        complete(app, prompt=prompt, max_tokens=16)["choices"][0]["text"] for prompt in prompts
    ]
    together: dict[str, str] = {}

    def ask(prompt: str) -> None:
        together[prompt] = complete(app, prompt=prompt, max_tokens=16)["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone
