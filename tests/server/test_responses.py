"""`/v1/responses`: items in, items out, at once and as events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live_app import LiveApp

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "weather", "description": "The weather.", "parameters": CITY}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def respond(app: LiveApp, **fields: Any) -> dict[str, Any]:
    response = app.post("responses", **{**GREEDY, "input": "hello", **fields})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def events(app: LiveApp, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; their names and numbers are checked."""
    body = {**GREEDY, "input": "hello", **fields, "stream": True}
    with app.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    """The types, each run of deltas as one."""
    types = [event["type"] for event in found]
    return [t for i, t in enumerate(types) if i == 0 or t != types[i - 1]]


def text_of(reply: dict[str, Any]) -> str:
    (item,) = reply["output"]
    (part,) = item["content"]
    text: str = part["text"]
    return text


def chat_text(app: LiveApp, messages: list[dict[str, Any]], **fields: Any) -> str:
    response = app.post("chat/completions", **{**GREEDY, "messages": messages, **fields})
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def without_times(reply: dict[str, Any]) -> dict[str, Any]:
    varying = ("id", "created_at", "completed_at", "output", "usage")
    return {name: value for name, value in reply.items() if name not in varying}


# -- text ------------------------------------------------------------------------------------------


def test_a_response_is_the_chat_completion(app: LiveApp) -> None:
    reply = respond(app, max_output_tokens=6)
    assert (reply["object"], reply["model"], reply["store"]) == ("response", "tiny", False)
    assert reply["id"].startswith("resp_") and reply["output"][0]["id"].startswith("msg_")
    expected = chat_text(app, [{"role": "user", "content": "hello"}], max_tokens=6)
    assert text_of(reply) == expected
    usage = reply["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (8, 6, 14)


def test_the_limit_makes_it_incomplete_and_an_end_completes_it(app: LiveApp) -> None:
    cut = respond(app, max_output_tokens=3)
    assert (cut["status"], cut["output"][0]["status"]) == ("incomplete", "incomplete")
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut["completed_at"] is None
    whole = respond(app, max_output_tokens=3, logit_bias={"256": 100})  # the end of the turn
    assert (whole["status"], whole["output"][0]["status"]) == ("completed", "completed")
    assert whole["incomplete_details"] is None and whole["completed_at"] >= whole["created_at"]
    assert text_of(whole) == ""


def test_instructions_and_items_are_messages(app: LiveApp) -> None:
    items = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": None}],
            "phase": None,
        },
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "c"}, {"type": "text", "text": "d"}],
        },
    ]
    reply = respond(app, input=items, instructions="hi", max_output_tokens=8)
    messages = [
        {"role": "system", "content": "hi"},
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\nd"},
    ]
    assert text_of(reply) == chat_text(app, messages, max_tokens=8)
    assert reply["instructions"] == "hi"


def test_an_answer_is_sent_back_as_it_came(app: LiveApp) -> None:
    first = respond(app, max_output_tokens=4)
    items = [
        {"role": "user", "content": "hello"},
        *first["output"],
        {"role": "user", "content": "on"},
    ]
    second = respond(app, input=items, max_output_tokens=4)
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


def test_what_was_asked_for_is_repeated(app: LiveApp) -> None:
    given = {
        "metadata": {"a": "b"},
        "user": "me",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "top_p": 0.5,
        "max_output_tokens": 1,
        "parallel_tool_calls": False,
        "store": True,
        "truncation": "disabled",
        "background": False,
        "service_tier": "auto",
    }
    reply = respond(app, **given)
    shown = {**given, "store": False, "service_tier": "default", "temperature": 0}
    assert {name: reply[name] for name in shown} == shown
    assert reply["text"]["format"] == {"type": "text"}


def test_cached_tokens_are_counted(app: LiveApp) -> None:
    prompt = "a response prompt that is longer than two blocks of sixteen tokens"
    respond(app, input=prompt, max_output_tokens=1)
    usage = respond(app, input=prompt, max_output_tokens=1)["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] >= 48


def test_log_probabilities(app: LiveApp) -> None:
    given = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    reply = respond(app, max_output_tokens=4, **given)
    logprobs = reply["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 4 and all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
    streamed = [
        entry
        for event in events(app, max_output_tokens=4, **given)
        if event["type"] == "response.output_text.delta"
        for entry in event["logprobs"]
    ]
    assert streamed == logprobs


def test_a_stream_is_the_response(app: LiveApp) -> None:
    whole = respond(app, max_output_tokens=9)
    found = events(app, max_output_tokens=9)
    assert kinds(found) == [*TEXT_EVENTS, "response.incomplete"]
    deltas = [e["delta"] for e in found if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text_of(whole)
    assert found[0]["response"]["status"] == "in_progress" and not found[0]["response"]["output"]
    last = found[-1]["response"]
    assert without_times(last) == without_times(whole)
    assert text_of(last) == text_of(whole)
    items = [e["item"] for e in found if e["type"] == "response.output_item.done"]
    assert items == last["output"]
    (done,) = [e for e in found if e["type"] == "response.output_text.done"]
    assert done["text"] == text_of(whole) and done["item_id"] == items[0]["id"]
    assert last["usage"]["output_tokens"] == 9


def test_an_empty_answer_has_all_its_events(app: LiveApp) -> None:
    found = events(app, max_output_tokens=9, logit_bias={"256": 100})
    without_delta = [kind for kind in TEXT_EVENTS if not kind.endswith("delta")]
    assert kinds(found) == [*without_delta, "response.completed"]


def test_what_the_server_aborts_has_failed(app: LiveApp) -> None:
    limit = app.engine.info.max_model_len - 50
    body = {**GREEDY, "input": "go", "max_output_tokens": limit, "ignore_eos": True}
    with app.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        app.engine.abort_all()
        data = [line for line in lines if line.startswith("data: ")]
    last = json.loads(data[-1].removeprefix("data: "))
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert "shutting down" in last["response"]["error"]["message"]
    assert last["response"]["output"][0]["status"] == "incomplete"


# -- forms and tools -------------------------------------------------------------------------------


def test_json_schemas_and_objects(app: LiveApp) -> None:
    form = {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}
    reply = respond(app, text={"format": form}, max_output_tokens=60)
    assert json.loads(text_of(reply))["city"] in ("Rome", "Paris")
    assert reply["text"]["format"] == form


def test_a_forced_call(app: LiveApp) -> None:
    named = {"type": "function", "name": "weather"}
    for choice in (named, "required"):
        given = {"tools": [TOOL], "tool_choice": choice, "max_output_tokens": 100}
        reply = respond(app, **given)
        (call,) = reply["output"]
        assert (call["type"], call["name"], call["status"]) == (
            "function_call",
            "weather",
            "completed",
        )
        assert json.loads(call["arguments"])["city"] in ("Rome", "Paris")
        assert (reply["status"], reply["tool_choice"]) == ("completed", choice)
        assert reply["tools"][0]["name"] == "weather"
        found = events(app, **given)
        deltas = [e["delta"] for e in found if e["type"].endswith("arguments.delta")]
        assert "".join(deltas) == call["arguments"]
        assert kinds(found)[2:] == [
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert found[-1]["response"]["output"][0]["arguments"] == call["arguments"]


def test_a_call_and_its_output_are_sent_back(app: LiveApp) -> None:
    question = {"role": "user", "content": "weather?"}
    first = respond(
        app, input=[question], tools=[TOOL], tool_choice="required", max_output_tokens=100
    )
    (call,) = first["output"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    given = {"input": [question, call, output], "tools": [TOOL], "tool_choice": "none"}
    second = respond(app, **given, max_output_tokens=4)
    assert second["output"][0]["type"] == "message"
    parts = {**output, "output": [{"type": "input_text", "text": "sunny"}]}
    again = respond(app, **{**given, "input": [question, call, parts]}, max_output_tokens=4)
    assert text_of(again) == text_of(second)


def test_several_calls_belong_to_one_message(app: LiveApp) -> None:
    items = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "let me see"},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
    ]
    function = {"name": "weather", "arguments": "{}"}
    messages = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [{"id": i, "type": "function", "function": function} for i in ("1", "2")],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
    ]
    given = {"model": "tiny", "messages": messages}
    expected = app.http.post("/tokenize", json=given).json()["count"]
    assert respond(app, input=items, max_output_tokens=1)["usage"]["input_tokens"] == expected


# -- errors ----------------------------------------------------------------------------------------

MESSAGE = {"role": "user", "content": "x"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "alien", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [MESSAGE, {"role": "user", "content": [{"type": "input_image"}]}]}, "input[1]"),
    ({"input": [{**MESSAGE, "colour": 1}]}, "input[0].colour"),
    ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].call_id"),
    ({"input": "x" * 5000}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "5"}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"temperature": 1000}, "temperature"),
    ({"top_logprobs": 5000}, "top_logprobs"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"background": 0}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object"}}, "seed": 2**70}, "seed"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [TOOL]}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("fields", "param"), BAD)
def test_bad_requests_name_the_field(
    app: LiveApp, fields: dict[str, Any], param: str, is_streamed: bool
) -> None:
    response = app.post("responses", **{"input": "x", **fields, "stream": is_streamed})
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert error["param"].startswith(param), error
    assert error["message"].startswith(error["param"])


def test_what_is_not_kept_says_what_to_do(app: LiveApp) -> None:
    error = app.post("responses", input="x", previous_response_id="resp_1").json()["error"]
    assert "send the earlier items in `input` again" in error["message"]


def test_null_means_not_given(app: LiveApp) -> None:
    names = (
        "previous_response_id",
        "tools",
        "text",
        "reasoning",
        "conversation",
        "stop",
        "include",
    )
    assert respond(app, max_output_tokens=1, **dict.fromkeys(names))["output"]
