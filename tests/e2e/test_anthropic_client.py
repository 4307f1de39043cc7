"""`/v1/messages` by Anthropic's own client against a server process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from servable import ServerProcess, running_server

KEY = "secret"
OPTIONS = (
    *("--num-gpu-blocks", "256", "--num-threads", "1", "--no-offload", "--api-key", KEY),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
HELLO: Any = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"model": "tiny", "extra_body": {"temperature": 0}}
TOOL: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def server(servable: Path) -> Iterator[ServerProcess]:
    with running_server(str(servable), "--served-model-name", "tiny", *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    options: dict[str, Any] = {"base_url": server.url, "max_retries": 0, "timeout": 300}
    with anthropic.Anthropic(api_key=KEY, **options) as found:
        yield found


def text_of(message: Any) -> str:
    (block,) = message.content
    assert block.type == "text"
    text: str = block.text
    return text


def test_a_message_and_its_stream(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(max_tokens=8, messages=HELLO, **GREEDY)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 8
    with client.messages.stream(max_tokens=8, messages=HELLO, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 8
    raw = client.messages.create(max_tokens=8, messages=HELLO, stream=True, **GREEDY)
    kinds = [event.type for event in raw]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_the_async_client(server: ServerProcess) -> None:
    async def ask() -> str:
        async with anthropic.AsyncAnthropic(base_url=server.url, auth_token=KEY) as found:
            message = await found.messages.create(max_tokens=8, messages=HELLO, **GREEDY)
        return text_of(message)

    assert asyncio.run(ask())


def test_system_stop_sequences_and_a_conversation(client: anthropic.Anthropic) -> None:
    cached: Any = {"type": "ephemeral"}
    system: Any = [{"type": "text", "text": "be brief", "cache_control": cached}]
    first = client.messages.create(max_tokens=30, messages=HELLO, system=system, **GREEDY)
    shown = [c for c in text_of(first)[1:] if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}"]
    stop = shown[0]
    cut = client.messages.create(
        max_tokens=30, messages=HELLO, system=system, stop_sequences=[stop], **GREEDY
    )
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    history: Any = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "on"},
    ]
    second = client.messages.create(max_tokens=4, messages=history, system=system, **GREEDY)
    assert second.usage.cache_read_input_tokens
    total = second.usage.input_tokens + second.usage.cache_read_input_tokens
    counted = client.messages.count_tokens(model="tiny", messages=history, system=system)
    assert counted.input_tokens == total


def test_a_tool_is_used(client: anthropic.Anthropic) -> None:
    forced: Any = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 100}
    first = client.messages.create(messages=HELLO, **forced, **GREEDY)
    (call,) = first.content
    assert call.type == "tool_use" and call.name == "weather"
    assert call.input["city"] in ("Rome", "Paris") and first.stop_reason == "tool_use"
    with client.messages.stream(messages=HELLO, **forced, **GREEDY) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == call.input
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    history: Any = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(
        messages=history, tools=[TOOL], tool_choice={"type": "none"}, max_tokens=4, **GREEDY
    )
    assert text_of(second)


def test_the_model_chooses_between_a_call_and_a_typed_answer(
    client: anthropic.Anthropic,
) -> None:
    """A random model is led to either by its first character."""
    form: Any = {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}
    fields: Any = {"messages": HELLO, "tools": [TOOL], "output_config": form, "max_tokens": 200}
    fields |= {"model": "tiny", "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    found: Any = client.post("/tokenize", cast_to=object, body={"prompt": "<{"})
    call_extra, text_extra = (
        {"temperature": 0, "logit_bias": {str(token): 100}} for token in found["tokens"]
    )
    whole = client.messages.create(**fields, extra_body=call_extra)
    (call,) = whole.content
    assert call.type == "tool_use" and whole.stop_reason == "tool_use"
    assert call.input["city"] in ("Rome", "Paris")
    with client.messages.stream(**fields, extra_body=call_extra) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == call.input
    answer = client.messages.create(**fields, extra_body=text_extra)
    assert answer.stop_reason == "end_turn"
    assert json.loads(text_of(answer))["city"] in ("Rome", "Paris")


def test_the_beta_client_is_served_too(client: anthropic.Anthropic) -> None:
    message = client.beta.messages.create(max_tokens=4, messages=HELLO, **GREEDY)
    assert message.usage.output_tokens == 4


def test_errors_are_those_of_the_client(client: anthropic.Anthropic, server: ServerProcess) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(model="other", max_tokens=1, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens=0: must be at least 1"):
        client.messages.create(model="tiny", max_tokens=0, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.create(model="tiny", max_tokens=1, messages=HELLO * 2000, stream=True)
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError, match="x-api-key"):
        stranger.messages.create(model="tiny", max_tokens=1, messages=HELLO)
