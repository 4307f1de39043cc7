"""`/v1/responses` by OpenAI's own client against a server process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from servable import running_server

KEY = "secret"
OPTIONS = (
    *("--num-gpu-blocks", "256", "--num-threads", "1", "--no-offload", "--api-key", KEY),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


class Place(BaseModel):
    """What the model must answer."""

    city: Literal["Rome", "Paris"]


TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {**Place.model_json_schema(), "additionalProperties": False},
    "strict": True,
}


@pytest.fixture(scope="module")
def client(servable: Path) -> Iterator[openai.OpenAI]:
    with running_server(str(servable), "--served-model-name", "tiny", *OPTIONS) as server:
        found = server.client(KEY)
        yield found
        found.close()


def test_a_response_and_its_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="hello", max_output_tokens=8, **GREEDY)
    assert whole.status == "incomplete" and whole.output_text
    assert whole.usage is not None and whole.usage.output_tokens == 8
    with client.responses.stream(input="hello", max_output_tokens=8, **GREEDY) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text


def test_a_stream_that_completes(client: openai.OpenAI) -> None:
    short: Any = {"extra_body": {"logit_bias": {"256": 5}}, "max_output_tokens": 300}
    with client.responses.stream(input="go", **GREEDY, **short) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert client.responses.create(input="go", **GREEDY, **short).output_text == final.output_text


def test_a_conversation_is_sent_again(client: openai.OpenAI) -> None:
    question = "a question that fills more than one block of the cache"
    first = client.responses.create(input=question, max_output_tokens=8, **GREEDY)
    history: list[Any] = [{"role": "user", "content": question}]
    history += [item.model_dump() for item in first.output]
    history.append({"role": "user", "content": "and now?"})
    second = client.responses.create(input=history, max_output_tokens=4, **GREEDY)
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0
    with pytest.raises(openai.BadRequestError, match="send the earlier items") as caught:
        client.responses.create(input="x", previous_response_id=first.id, **GREEDY)
    assert caught.value.param == "previous_response_id"


def test_a_parsed_answer(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        input="where?", text_format=Place, max_output_tokens=60, **GREEDY
    )
    assert isinstance(parsed.output_parsed, Place)


def test_a_call_of_a_function_and_its_output(client: openai.OpenAI) -> None:
    forced: Any = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 100}
    history: list[Any] = [{"role": "user", "content": "weather?"}]
    first = client.responses.create(input=history, **forced, **GREEDY)
    (call,) = first.output
    assert call.type == "function_call" and call.name == "weather"
    Place.model_validate_json(call.arguments)
    with client.responses.stream(input=history, **forced, **GREEDY) as stream:
        events = list(stream)
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == json.loads(call.arguments)
    history += [item.model_dump() for item in first.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = client.responses.create(
        input=history, tools=[TOOL], tool_choice="none", max_output_tokens=4, **GREEDY
    )
    assert second.output[0].type == "message"


def test_the_model_chooses_between_a_call_and_a_typed_answer(client: openai.OpenAI) -> None:
    """A random model is led to either by its first character."""
    form: Any = {"type": "json_schema", "name": "place", "schema": TOOL["parameters"]}
    fields: Any = {"input": "where?", "tools": [TOOL], "text": {"format": form}, **GREEDY}
    fields |= {"max_output_tokens": 200, "parallel_tool_calls": False}
    found: Any = client.post("../tokenize", cast_to=object, body={"prompt": "<{"})
    call_bias, text_bias = ({"logit_bias": {str(token): 100}} for token in found["tokens"])
    (call,) = client.responses.create(**fields, extra_body=call_bias).output
    assert call.type == "function_call" and call.name == "weather"
    Place.model_validate_json(call.arguments)
    with client.responses.stream(**fields, extra_body=call_bias) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call" and streamed.arguments == call.arguments
    answer = client.responses.create(**fields, extra_body=text_bias)
    assert answer.output[0].type == "message"
    Place.model_validate_json(answer.output_text)


def test_errors_are_those_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="x", max_output_tokens=0)
    assert caught.value.param == "max_output_tokens"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").responses.create(model="tiny", input="x")
