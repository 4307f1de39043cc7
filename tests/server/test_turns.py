"""Chunks of chat completions as parts of a turn, and the events that they become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tierkv.errors import EngineDeadError, RequestError
from tierkv.server.errors import RequestTimeoutError
from tierkv.server.generation import ChatReply
from tierkv.server.messages_body import MessagesBody
from tierkv.server.messages_reply import MessageReply
from tierkv.server.responses_body import ResponsesBody
from tierkv.server.responses_reply import ResponseReply
from tierkv.server.turns import Turn

Json = dict[str, Any]
USAGE: Json = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


class StandIn(ChatReply):
    """A chat completion that nobody asks."""

    def __init__(self) -> None:
        self.num_sequences = 1


def chunk(*, end: str | None = None, **delta: Any) -> Json:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": end}
    return {"choices": [choice], "usage": USAGE}


def call(index: int, arguments: str, *, name: str | None = None) -> Json:
    head = {} if name is None else {"id": f"call_{index}", "type": "function"}
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    return {"index": index, **head, "function": function}


TEXT_AND_CALLS = [
    chunk(role="assistant", content=""),
    chunk(content="let "),
    chunk(content="me", tool_calls=[call(0, "", name="f")]),
    chunk(tool_calls=[call(0, '{"a"')]),
    chunk(tool_calls=[call(0, ": 1}"), call(1, "{}", name="g")]),
    chunk(end="tool_calls"),
]


def message() -> MessageReply:
    body = MessagesBody.model_validate(
        {"max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    )
    return MessageReply(StandIn(), body, "tiny")


def response() -> ResponseReply:
    return ResponseReply(StandIn(), ResponsesBody.model_validate({"input": "x"}), "tiny")


def told(reply: MessageReply | ResponseReply, chunks: list[Json]) -> list[Json]:
    """All events between the opening and the closing."""
    return [event for one in chunks for step in reply.turn.steps(one) for event in reply.tell(step)]


def test_text_and_calls_are_parts_in_their_order() -> None:
    turn = Turn()
    steps = [step for one in TEXT_AND_CALLS for step in turn.steps(one)]
    assert [(p.is_text, p.name, p.text) for p in turn.parts] == [
        (True, "", "let me"),
        (False, "f", '{"a": 1}'),
        (False, "g", "{}"),
    ]
    shown = [(step.kind, step.part.index) for step in steps]
    assert shown == [
        ("begin", 0),
        ("grow", 0),
        ("grow", 0),
        ("end", 0),
        ("begin", 1),
        ("grow", 1),
        ("grow", 1),
        ("end", 1),
        ("begin", 2),
        ("grow", 2),
        ("end", 2),
    ]
    assert turn.has_calls and turn.finish_reason == "tool_calls" and turn.usage == USAGE


def test_a_whole_completion_has_the_same_parts() -> None:
    calls = [
        {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    said = {"role": "assistant", "content": "let me", "tool_calls": calls}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "tool_calls"}
    whole = Turn.of({"choices": [choice], "usage": USAGE})
    streamed = Turn()
    for one in TEXT_AND_CALLS:
        list(streamed.steps(one))
    assert whole.parts == streamed.parts


def test_log_probabilities_come_before_their_text() -> None:
    turn, entry = Turn(), {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -1.0}
    held = chunk(content="")
    held["choices"][0]["logprobs"] = {"content": [entry]}
    (begun, grown) = turn.steps(held)
    assert (begun.kind, grown.kind, grown.delta, grown.logprobs) == ("begin", "grow", "", (entry,))


def test_a_message_of_text_and_calls() -> None:
    reply = message()
    events = told(reply, TEXT_AND_CALLS)
    starts = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert starts == ["text", "tool_use", "tool_use"]
    whole = reply.whole()
    assert [block["type"] for block in whole["content"]] == starts
    assert whole["content"][1]["input"] == {"a": 1} and whole["stop_reason"] == "tool_use"
    (delta, stop) = reply.closing()
    assert delta["delta"]["stop_reason"] == "tool_use" and stop == {"type": "message_stop"}


def test_a_response_of_text_and_calls() -> None:
    reply = response()
    events = told(reply, TEXT_AND_CALLS)
    items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert items == reply.whole()["output"]
    assert [item["type"] for item in items] == ["message", "function_call", "function_call"]
    places = {e["output_index"] for e in events}
    assert places == {0, 1, 2}
    assert len({item["id"] for item in items}) == 3


def test_only_the_last_item_is_cut_off() -> None:
    reply = response()
    told(reply, [*TEXT_AND_CALLS[:-1], chunk(end="length")])
    statuses = [item["status"] for item in reply.whole()["output"]]
    assert statuses == ["completed", "completed", "incomplete"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestTimeoutError("too slow"), "timeout_error"),
        (EngineDeadError("gone"), "overloaded_error"),
        (RequestError("messages", "x", "is wrong"), "invalid_request_error"),
    ],
)
def test_an_error_is_the_last_event(error: Exception, kind: str) -> None:
    name, data, *_ = message().error_event(error).decode().split("\n")
    found = json.loads(data.removeprefix("data: "))
    assert (name, found["type"], found["error"]["type"]) == ("event: error", "error", kind)
    reply = response()
    list(reply.opening())
    name, data, *_ = reply.error_event(error).decode().split("\n")
    found = json.loads(data.removeprefix("data: "))
    assert (name, found["type"], found["sequence_number"]) == ("event: error", "error", 2)
    assert found["message"] == str(error)
