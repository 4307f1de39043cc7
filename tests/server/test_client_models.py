"""Replies and events have every field that the clients' own models require."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic.types
import openai.types
import openai.types.chat
import openai.types.responses
import pytest
from live_app import LiveApp
from pydantic import BaseModel, TypeAdapter

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "parameters": PARAMETERS}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}
OPENAI_CALL = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}
RESPONSES_CALL = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
ANTHROPIC_CALL = {
    "tools": [{"name": "weather", "input_schema": PARAMETERS}],
    "tool_choice": {"type": "tool", "name": "weather"},
}
USAGE = {"stream_options": {"include_usage": True}}

WHOLE: list[tuple[str, type[BaseModel], dict[str, Any]]] = [
    ("completions", openai.types.Completion, {"prompt": ["a", "b"], "n": 2, "logprobs": 1}),
    ("chat/completions", openai.types.chat.ChatCompletion, {**CHAT, "n": 2, "logprobs": True}),
    ("chat/completions", openai.types.chat.ChatCompletion, {**CHAT, **OPENAI_CALL}),
    ("responses", openai.types.responses.Response, {"input": "hi", "max_output_tokens": 3}),
    ("responses", openai.types.responses.Response, {"input": "hi", **RESPONSES_CALL}),
    ("messages", anthropic.types.Message, CHAT),
    ("messages", anthropic.types.Message, {**CHAT, **ANTHROPIC_CALL}),
    ("messages/count_tokens", anthropic.types.MessageTokensCount, {"messages": CHAT["messages"]}),
]
CHUNK: Any = TypeAdapter(openai.types.chat.ChatCompletionChunk)
EVENT: Any = TypeAdapter(openai.types.responses.ResponseStreamEvent)
MESSAGE_EVENT: Any = TypeAdapter(anthropic.types.RawMessageStreamEvent)
STREAMS: list[tuple[str, Any, dict[str, Any]]] = [
    ("chat/completions", CHUNK, {**CHAT, "logprobs": True, **USAGE}),
    ("chat/completions", CHUNK, {**CHAT, **OPENAI_CALL}),
    ("responses", EVENT, {"input": "hi", "max_output_tokens": 3, "top_logprobs": 1}),
    ("responses", EVENT, {"input": "hi", **RESPONSES_CALL}),
    ("messages", MESSAGE_EVENT, CHAT),
    ("messages", MESSAGE_EVENT, {**CHAT, **ANTHROPIC_CALL}),
]


@pytest.mark.parametrize(("path", "model", "fields"), WHOLE)
def test_replies(app: LiveApp, path: str, model: type[BaseModel], fields: dict[str, Any]) -> None:
    response = app.post(path, **fields)
    assert response.status_code == 200, response.text
    model.model_validate(response.json())


@pytest.mark.parametrize(("path", "model", "fields"), STREAMS)
def test_events(app: LiveApp, path: str, model: Any, fields: dict[str, Any]) -> None:
    found = list(events(app, path, fields))
    assert len(found) > 3
    for event in found:
        if event.get("type") != "ping":  # which the client skips
            model.validate_python(event)


def events(app: LiveApp, path: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    text = app.post(path, **fields, stream=True).text
    for line in text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_lists_of_models(app: LiveApp) -> None:
    found = app.http.get("/v1/models").json()
    assert found["data"]
    for card in found["data"]:
        openai.types.Model.model_validate(card)
        assert card["root"] == app.engine.info.model
