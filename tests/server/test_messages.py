"""`/v1/messages`: Anthropic's turns and blocks, at once and as events."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from live_app import LiveApp

from tierkv.server.messages_reply import arguments

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "messages": [HELLO]}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "weather", "description": "The weather.", "input_schema": CITY}


def ask(app: LiveApp, **fields: Any) -> dict[str, Any]:
    response = app.post("messages", **{**GREEDY, "max_tokens": 6, **fields})
    assert response.status_code == 200, response.text[:300]
    reply: dict[str, Any] = response.json()
    return reply


def events(app: LiveApp, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; their names are checked."""
    body = {**GREEDY, "max_tokens": 6, **fields, "stream": True}
    text = app.http.post("/v1/messages", json=body).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    """The types, each run of deltas as one."""
    types = [event["type"] for event in found]
    return [t for i, t in enumerate(types) if i == 0 or t != types[i - 1]]


def count(app: LiveApp, **fields: Any) -> int:
    response = app.post("messages/count_tokens", **{"messages": [HELLO], **fields})
    assert response.status_code == 200, response.text
    number: int = response.json()["input_tokens"]
    return number


def chat_text(app: LiveApp, messages: list[dict[str, Any]], **fields: Any) -> str:
    given = {"model": "tiny", "temperature": 0, "messages": messages, "max_tokens": 6}
    response = app.post("chat/completions", **{**given, **fields})
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def text_of(reply: dict[str, Any]) -> str:
    (block,) = reply["content"]
    text: str = block["text"]
    return text


# -- text ------------------------------------------------------------------------------------------


def test_a_message_is_the_chat_completion(app: LiveApp) -> None:
    reply = ask(app)
    assert (reply["type"], reply["role"], reply["model"]) == ("message", "assistant", "tiny")
    assert reply["id"].startswith("msg_")
    assert text_of(reply) == chat_text(app, [HELLO])
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("max_tokens", None)
    usage = reply["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 8
    assert (usage["output_tokens"], usage["cache_creation_input_tokens"]) == (6, 0)


def test_why_it_ends(app: LiveApp) -> None:
    assert ask(app, logit_bias={"256": 100})["stop_reason"] == "end_turn"
    full = text_of(ask(app, max_tokens=40))
    stop = next(c for c in full[2:] if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    cut = ask(app, max_tokens=40, stop_sequences=[stop, "never"])
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)
    assert text_of(cut) == full[: full.index(stop)]
    limit = app.engine.info.max_model_len
    long = [{"role": "user", "content": "x" * (limit - 10)}]
    reply = ask(app, messages=long, max_tokens=100, ignore_eos=True)
    assert reply["stop_reason"] == "model_context_window_exceeded"


def test_system_and_blocks_are_messages(app: LiveApp) -> None:
    cached = {"type": "ephemeral", "ttl": "1h"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": cached}]},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": [{"type": "text", "text": "c", "citations": None}]},
        {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
        {"role": "system", "content": "be kind"},
    ]
    plain = [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d\ne"},
        {"role": "system", "content": "be kind"},
    ]
    system = [
        {"type": "text", "text": "be"},
        {"type": "text", "text": "brief", "cache_control": cached},
    ]
    reply = ask(app, messages=messages, system=system, cache_control=cached)
    assert text_of(reply) == chat_text(app, plain)
    assert text_of(ask(app, messages=messages, system="be\nbrief")) == text_of(reply)


def test_a_last_turn_of_the_assistant_is_continued(app: LiveApp) -> None:
    begun = [HELLO, {"role": "assistant", "content": "well"}]
    prompt = "<|user|>hello<|end|><|assistant|>well"
    given = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 6}
    expected = app.post("completions", **given).json()["choices"][0]["text"]
    assert text_of(ask(app, messages=begun)) == expected
    assert count(app, messages=begun) == 3 + len("hello") + len("well")


def test_a_stream_is_the_message(app: LiveApp) -> None:
    whole = ask(app, max_tokens=9)
    found = events(app, max_tokens=9)
    assert kinds(found) == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = found[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None
    assert start["usage"]["input_tokens"] + start["usage"]["cache_read_input_tokens"] == 8
    deltas = [e["delta"]["text"] for e in found if e["type"] == "content_block_delta"]
    assert "".join(deltas) == text_of(whole)
    last = found[-2]
    assert last["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == 9


def test_cached_tokens_are_read_not_computed(app: LiveApp) -> None:
    long = [{"role": "user", "content": "a message that is longer than two blocks of sixteen"}]
    ask(app, messages=long, max_tokens=1)
    usage = ask(app, messages=long, max_tokens=1)["usage"]
    assert usage["cache_read_input_tokens"] >= 32
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count(app, messages=long)
    started = events(app, messages=long, max_tokens=1)[0]["message"]["usage"]
    assert started["cache_read_input_tokens"] >= 32


def test_counts_are_those_of_the_reply(app: LiveApp) -> None:
    fields: dict[str, Any] = {
        "messages": [HELLO, {"role": "assistant", "content": "yes"}, HELLO],
        "system": "be brief",
        "tools": [TOOL],
        "tool_choice": {"type": "any"},
    }
    usage = ask(app, **fields)["usage"]
    assert count(app, **fields) == usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_the_server_aborts_is_an_error(app: LiveApp, is_streamed: bool) -> None:
    limit = app.engine.info.max_model_len - 50
    body = {**GREEDY, "max_tokens": limit, "ignore_eos": True, "stream": is_streamed}
    found: list[httpx.Response] = []
    asker = threading.Thread(target=lambda: found.append(app.http.post("/v1/messages", json=body)))
    asker.start()
    app.wait_for(lambda metrics: metrics["running"] == 1)
    app.engine.abort_all()
    asker.join()
    (response,) = found
    if is_streamed:
        *_, name, data = response.text.strip().splitlines()
        assert name == "event: error"
        error = json.loads(data.removeprefix("data: "))
    else:
        assert response.status_code == 503
        error = response.json()
    assert error["type"] == "error" and error["error"]["type"] == "overloaded_error"
    assert "shutting down" in error["error"]["message"]


# -- tools and forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call(app: LiveApp, choice: dict[str, Any]) -> None:
    given: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 100}
    reply = ask(app, **given)
    (block,) = reply["content"]
    assert (block["type"], block["name"]) == ("tool_use", "weather")
    assert block["input"]["city"] in ("Rome", "Paris") and block["id"]
    assert reply["stop_reason"] == "tool_use"
    found = events(app, **given)
    begun = next(e for e in found if e["type"] == "content_block_start")["content_block"]
    assert (begun["type"], begun["name"], begun["input"]) == ("tool_use", "weather", {})
    parts = [e["delta"]["partial_json"] for e in found if e["type"] == "content_block_delta"]
    assert json.loads("".join(parts)) == block["input"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_call_and_its_result_are_sent_back(app: LiveApp) -> None:
    question = {"role": "user", "content": "weather?"}
    any_call: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "any"}}
    first = ask(app, messages=[question], max_tokens=100, **any_call)
    (call,) = first["content"]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    turns = [question, {"role": "assistant", "content": first["content"]}]
    given: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "none"}}
    plain = ask(app, messages=[*turns, {"role": "user", "content": [result]}], **given)
    assert plain["content"][0]["type"] == "text"
    blocks = {**result, "content": [{"type": "text", "text": "sunny"}], "is_error": False}
    same = ask(app, messages=[*turns, {"role": "user", "content": [blocks]}], **given)
    assert text_of(same) == text_of(plain)
    counts = [
        count(app, messages=[*turns, {"role": "user", "content": [{**result, **change}]}], **given)
        for change in ({}, {"is_error": True}, {"content": None})
    ]
    assert counts[1] == counts[0] + len("Error: ")
    assert counts[2] == counts[0] - len("sunny")


def test_json_by_a_schema(app: LiveApp) -> None:
    form = {"format": {"type": "json_schema", "schema": CITY}}
    reply = ask(app, output_config=form, max_tokens=60)
    assert json.loads(text_of(reply))["city"] in ("Rome", "Paris")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": 1, "b": [2, 3', {"a": 1, "b": [2, 3]}),
        ('{"a": 1, "b": "half', {"a": 1}),
        ("[1]", {}),
        ("nonsense", {}),
    ],
)
def test_arguments_of_a_call_that_was_cut_off(text: str, found: dict[str, Any]) -> None:
    assert arguments(text) == found


# -- errors ----------------------------------------------------------------------------------------

USE = {"type": "tool_use", "id": "1", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "x"}


def of_user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens=None: is required"),
    ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"messages": []}, "messages=[]: must be a list that is not empty"),
    ({"messages": "hi"}, "messages='hi': must be a list"),
    ({"messages": [5]}, "messages[0]=5: must be an object"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role='tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content=None: is required"),
    ({"messages": [HELLO, {"role": "user", "content": []}]}, "messages[1].content=[]"),
    ({"messages": [{"role": "system", "content": []}]}, "messages[0].content=[]"),
    (of_user({"type": "image", "source": {}}), "messages[0].content[0].type='image'"),
    (of_user({"type": "text", "text": 5}), "messages[0].content[0].text=5: must be text"),
    (of_user(USE), "messages[0].content[0].type='tool_use'"),
    ({"messages": [HELLO, {"role": "assistant", "content": [RESULT]}]}, "messages[1].content[0]"),
    ({"messages": [HELLO, {"role": "assistant", "content": [USE]}]}, "messages[1]='weather'"),
    (of_user({"type": "text", "text": "x", "colour": 1}), "messages[0].content[0].colour"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages='<5003 tokens>'"),
    ({"temperature": 1000}, "temperature=1000"),
    ({"top_k": -5}, "top_k=-5"),
    ({"stop_sequences": [""]}, "stop_sequences=''"),
    ({"stop_sequences": "x"}, "stop_sequences='x': must be a list"),
    ({"stop": "x"}, "stop='x'"),
    ({"system": 5}, "system=5: must be text or a list"),
    ({"system": [{"type": "text"}]}, "system[0].text=None: is required"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking="),
    ({"container": "x"}, "container='x'"),
    ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0].type"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema=None: is required"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name='a b'"),
    ({"tools": [TOOL]}, "tool_choice='auto': start the server with --enable-auto-tool-choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name='x'"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice='any': must be an object"),
    ({"output_config": {"format": {"type": "json"}}}, "output_config.format.type"),
    ({"output_config": {"effort": "high"}}, "output_config.effort"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id=5"),
    ({"cache_control": {"type": "persistent"}}, "cache_control.type"),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_requests_name_the_field(
    app: LiveApp, fields: dict[str, Any], message: str, is_streamed: bool
) -> None:
    body = {"max_tokens": 1, "messages": [HELLO], **fields, "stream": is_streamed}
    response = app.post("messages", **body)
    assert response.status_code == 400, response.text[:300]
    found = response.json()
    assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
    assert found["error"]["message"].startswith(message)
    assert found["request_id"] == response.headers["x-request-id"]


def test_other_errors_have_the_same_form(app: LiveApp) -> None:
    answers = {
        "not_found_error": app.post("messages", max_tokens=1, messages=[HELLO], model="other"),
        "authentication_error": httpx.post(f"{app.url}/v1/messages", json={}),
        "invalid_request_error": app.http.get("/v1/messages"),
    }
    statuses = {"not_found_error": 404, "authentication_error": 401, "invalid_request_error": 405}
    for kind, response in answers.items():
        assert response.status_code == statuses[kind]
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == kind
    counted = app.post("messages/count_tokens", messages=[])
    assert counted.json()["error"]["message"].startswith("messages=[]")


def test_the_key_comes_in_either_header(app: LiveApp) -> None:
    for headers in ({"x-api-key": app.api_key}, {"Authorization": f"Bearer {app.api_key}"}):
        body = {"max_tokens": 1, "messages": [HELLO]}
        response = httpx.post(f"{app.url}/v1/messages", json=body, headers=headers, timeout=60)
        assert response.status_code == 200
        assert httpx.get(f"{app.url}/v1/models", headers=headers).status_code == 200
    wrong = httpx.post(f"{app.url}/v1/messages", json={}, headers={"x-api-key": "wrong"})
    assert wrong.status_code == 401


def test_neutral_values_pass(app: LiveApp) -> None:
    neutral = {
        "thinking": {"type": "disabled"},
        "service_tier": "auto",
        "metadata": {"user_id": "me"},
        "mcp_servers": [],
        "container": None,
        "tools": [],
    }
    assert ask(app, **neutral)["content"]
