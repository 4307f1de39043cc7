"""The OpenAPI schema and the parsers agree on what a body is; no engine is needed for that."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import BaseModel
from schemathesis.generation import GenerationMode

from tierkv.errors import RequestError
from tierkv.server.bodies import MappedBody, chat_body, parse_strictly
from tierkv.server.messages_body import MessagesBody, PromptBody
from tierkv.server.openapi import DocumentedApp
from tierkv.server.parsing import parse_body
from tierkv.server.protocol import ChatBody, CompletionBody
from tierkv.server.responses_body import ResponsesBody
from tierkv.server.routes import completions, messages, responses, tokens
from tierkv.server.tokens_body import DetokenizeBody, TokenizeChatBody, parse_tokenize

ROUTERS = (completions.router, messages.router, responses.router, tokens.router)
TOGETHER = (
    "needs |cannot be combined|give exactly one|at most max_tokens|at least n=|is none of the tools"
    "|is the name of another|is no JSON|must be a JSON|ends with a tool_use|since there is a schema"
    "|must be a non-empty list of texts"
)
"""Why a body may be refused that follows the schema: its fields do not go together, or a text
within it is no JSON."""

USER = {"role": "user", "content": "x"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "y", "refusal": None, "annotations": []}


def document() -> dict[str, Any]:
    """The schema of the endpoints that take bodies."""
    app = DocumentedApp(title="tierkv", version="1")
    app.model_names, app.has_key, app.has_admin = ["tiny"], False, False
    context: Any = SimpleNamespace(engine=None, settings=None, check_key=lambda: None)
    for router in ROUTERS:
        app.include_router(router(context))
    return app.openapi()


DOCUMENT = document()


def as_chat(body: ChatBody) -> None:
    body.params(), body.beam_search(), body.template_input()


def parse_completion(raw: bytes) -> None:
    body = parse_body(raw, CompletionBody)
    body.params(), body.beam_search(), body.prompts()


def mapped(kind: type[MappedBody]) -> Callable[[bytes], None]:
    return lambda raw: as_chat(chat_body(parse_strictly(raw, kind).chat_fields()))


def parse_tokens(raw: bytes) -> None:
    body = parse_tokenize(raw)
    if isinstance(body, TokenizeChatBody):
        as_chat(chat_body(body.chat_fields()))


PARSERS: dict[str, Callable[[bytes], Any]] = {
    "/v1/completions": parse_completion,
    "/v1/chat/completions": lambda raw: as_chat(parse_body(raw, ChatBody)),
    "/v1/responses": mapped(ResponsesBody),
    "/v1/messages": mapped(MessagesBody),
    "/v1/messages/count_tokens": mapped(PromptBody),
    "/tokenize": parse_tokens,
    "/detokenize": lambda raw: parse_strictly(raw, DetokenizeBody),
}


def described(path: str, body: Any) -> bool:
    """Whether the schema allows the body."""
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    schema = {**content["application/json"]["schema"], "components": DOCUMENT["components"]}
    return bool(jsonschema.Draft202012Validator(schema).is_valid(body))


@pytest.mark.parametrize("path", list(PARSERS))
def test_what_the_schema_allows_is_taken(path: str) -> None:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    results: Counter[bool] = Counter()

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def run(case: schemathesis.Case) -> None:
        try:
            PARSERS[path](json.dumps(case.body).encode())
        except RequestError as error:
            assert re.search(TOGETHER, error.fix), (error, case.body)
            results[False] += 1
        else:
            results[True] += 1

    run()
    assert results[True] > 10, results


CALL = {"id": "1", "function": {"name": "f", "arguments": ""}}
CHAT: dict[str, Any] = {"messages": [USER]}
EAGER_TOOL = {"name": "f", "input_schema": {}, "eager_input_streaming": True}
TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": [1.0, 2], "max_tokens": 16.0, "n": None, "x": None}),
    ("/v1/completions", {"prompt": [[1], [2.0]], "priority": None, "stop_token_ids": [3.0]}),
    ("/v1/completions", {"prompt": "", "structured_outputs": {"regex": "a", "json": None}}),
    ("/v1/chat/completions", {"messages": [USER, ANSWER], "add_generation_prompt": None}),
    ("/v1/chat/completions", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": None}}),
    (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"include_obfuscation": False}},
    ),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 0, "bad_words": [], "store": False}),
    ("/v1/chat/completions", {**CHAT, "metadata": {"a": "b"}, "prompt_cache_key": "k"}),
    ("/v1/chat/completions", {**CHAT, "verbosity": "medium", "reasoning_effort": "none"}),
    ("/v1/responses", {"input": "", "instructions": "", "max_output_tokens": 5.0}),
    ("/v1/responses", {"input": [{"role": "system", "content": ""}]}),
    ("/v1/responses", {"input": [{"role": "user", "content": []}], "text": {"format": {}}}),
    ("/v1/messages", {"messages": [{"role": "system", "content": ""}, USER], "max_tokens": 1.0}),
    ("/v1/messages", {**CHAT, "max_tokens": 1, "system": []}),
    ("/v1/messages", {**CHAT, "max_tokens": 1, "system": [{"type": "text", "text": ""}]}),
    ("/v1/messages", {**CHAT, "max_tokens": 1, "tools": [EAGER_TOOL]}),
    ("/v1/responses", {"input": "x", "include": ["reasoning.encrypted_content"]}),
    ("/tokenize", {"messages": [USER, ANSWER]}),
    ("/tokenize", {"prompt": "x", "add_special_tokens": None}),
    ("/detokenize", {"tokens": [1.0]}),
]


@pytest.mark.parametrize(("path", "body"), TAKEN, ids=str)
def test_what_is_taken_is_described(path: str, body: dict[str, Any]) -> None:
    is_empty = body.get("prompt") == ""  # of which the engine would say so
    assert described(path, body) or is_empty
    PARSERS[path](json.dumps(body).encode())


ONE_TOOL = [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "x", "store": 0}, "store"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    ("/v1/completions", {"prompt": [1.5]}, "prompt"),
    ("/v1/completions", {"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    ("/v1/completions", {"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("/v1/completions", {"prompt": "x", "guided_choice": []}, "guided_choice"),
    ("/v1/completions", {"prompt": "x", "length_penalty": 101}, "length_penalty"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{**USER, "content": 5}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{**USER, "x": 0}]}, "messages[0].x"),
    ("/v1/chat/completions", {**CHAT, "tools": ONE_TOOL}, "tools[0].function.parameters.type"),
    ("/v1/responses", {"input": []}, "input"),
    ("/v1/messages", {"messages": [], "max_tokens": 1}, "messages"),
    (
        "/v1/messages",
        {"messages": [{"role": "system", "content": []}], "max_tokens": 1},
        "messages[0].content",
    ),
    ("/tokenize", {"messages": [{}]}, "messages[0].role"),
    ("/tokenize", {"messages": [{**USER, "content": 5}]}, "messages[0].content"),
    ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
]


@pytest.mark.parametrize(("path", "body", "field"), REFUSED, ids=str)
def test_what_is_not_described_is_refused(path: str, body: dict[str, Any], field: str) -> None:
    assert not described(path, body)
    with pytest.raises(RequestError) as caught:
        PARSERS[path](json.dumps(body).encode())
    assert caught.value.field == field


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 400 + ".5", "1" * 250 + "e99"])
@pytest.mark.parametrize("body", [CompletionBody, ResponsesBody, MessagesBody])
def test_numbers_that_would_be_infinite_are_refused(body: type[BaseModel], number: str) -> None:
    raw = b'{"prompt": "x", "tools": [{"a": {"maximum": 1e5, "minimum": %s}}]}'
    with pytest.raises(RequestError, match="larger than any number") as caught:
        parse_strictly(raw % number.encode(), body)
    assert caught.value.field == "tools[0].a.minimum"
