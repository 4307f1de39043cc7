"""OpenAI's own client, unmodified, against a server process: what it sends, and what it reads."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from servable import running_server

MODEL = "tiny"
MESSAGES: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 8},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"const": {}}}},
]
WRITTEN_CALLS = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "unit": "C"}}'
    '\n</tool_call>\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def client(servable: Path) -> Iterator[openai.OpenAI]:
    flags = (
        *("--served-model-name", MODEL, "--num-gpu-blocks", "1024", "--num-threads", "1"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--no-offload"),
    )
    with running_server(str(servable), *flags) as server, server.client() as found:
        yield found


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    values = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 1000, **fields}
    return client.chat.completions.create(**values)


def client_tokens(client: openai.OpenAI, text: str) -> list[int]:
    """The tokens of a text, by `/tokenize`."""
    found: Any = client.post("../tokenize", cast_to=object, body={"prompt": text})
    tokens: list[int] = found["tokens"]
    return tokens


# -- chat and completions --------------------------------------------------------------------------


def test_chat_with_log_probabilities(client: openai.OpenAI) -> None:
    reply = ask(client, max_completion_tokens=5, logprobs=True, top_logprobs=3, temperature=0)
    (choice,) = reply.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert len(choice.logprobs.content) == 5
    for entry in choice.logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 3


def test_four_samples(client: openai.OpenAI) -> None:
    reply = ask(client, n=4, max_completion_tokens=12, seed=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in reply.choices}) == 4
    assert reply.usage.completion_tokens == 48
    again = ask(client, n=4, max_completion_tokens=12, seed=3)
    assert [c.message for c in again.choices] == [c.message for c in reply.choices]


def test_a_stream_with_usage_in_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, max_completion_tokens=9, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 9
    assert chunks[-1].choices == []
    assert chunks[0].choices[0].delta.role == "assistant"


def test_where_the_prompt_s_tokens_came_from(client: openai.OpenAI) -> None:
    prompt: Any = [{"role": "user", "content": "where do the tokens of this prompt come from?"}]
    fields: Any = {"messages": prompt, "max_completion_tokens": 1}
    details = [ask(client, **fields, extra_body={"cache_salt": "mine"}).usage for _ in range(2)]
    first, second = (found.prompt_tokens_details.model_dump() for found in details)
    total = details[0].prompt_tokens
    assert (first["gpu_tokens"], first["computed_tokens"]) == (0, total)
    assert second["cached_tokens"] == second["gpu_tokens"] >= total - 16
    assert second["computed_tokens"] == total - second["gpu_tokens"]
    assert (second["cpu_tokens"], second["nvme_tokens"]) == (0, 0)


def test_the_best_of_several_samples(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": ["one", "two"], "max_tokens": 4, "seed": 5}
    best = client.completions.create(**fields, best_of=6, n=2)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert best.usage is not None and best.usage.completion_tokens == 2 * 6 * 4
    scored = client.completions.create(**fields, n=6, logprobs=0)
    for number in range(2):
        samples = scored.choices[6 * number : 6 * number + 6]
        ranked = sorted(samples, key=lambda c: -sum(c.logprobs.token_logprobs))  # type: ignore
        shown = best.choices[2 * number : 2 * number + 2]
        assert [choice.text for choice in shown] == [choice.text for choice in ranked[:2]]
        assert shown[0].logprobs is None


def test_beam_search(client: openai.OpenAI) -> None:
    search: Any = {"use_beam_search": True}
    reply = ask(client, n=3, max_completion_tokens=6, temperature=0, extra_body=search)
    assert len({choice.message.content for choice in reply.choices}) == 3
    greedy = client.completions.create(model=MODEL, prompt="x", max_tokens=5, temperature=0)
    one = client.completions.create(
        model=MODEL, prompt="x", max_tokens=5, temperature=0, extra_body=search
    )
    assert one.choices[0].text == greedy.choices[0].text
    for fields, name in (
        ({"stream": True}, "stream"),
        ({"logprobs": True}, "logprobs"),
        ({"temperature": 0.5}, "temperature"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, n=2, extra_body=search, **fields)
        assert caught.value.param == name


def test_prompts_are_truncated_on_the_left(client: openai.OpenAI) -> None:
    extra: Any = {"truncate_prompt_tokens": 4, "echo": True, "return_tokens_as_token_ids": True}
    (choice,) = client.completions.create(
        model=MODEL, prompt="0123456789", max_tokens=1, logprobs=1, extra_body=extra
    ).choices
    assert choice.text.startswith("6789")
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == 5
    assert all(re.fullmatch(r"token_id:\d+", token) for token in choice.logprobs.tokens)
    long = ask(
        client,
        messages=[{"role": "user", "content": "x" * 9000}],
        max_tokens=5,
        max_completion_tokens=None,
        extra_body={"truncate_prompt_tokens": -1, "ignore_eos": True},
    )
    assert long.usage.completion_tokens == 5


def test_a_message_is_continued(client: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "once upon"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True, "echo": True}
    fields: Any = {"messages": messages, "max_completion_tokens": 3, "temperature": 0}
    reply = ask(client, **fields, extra_body=extra)
    assert reply.choices[0].message.content.startswith("once upon")
    chunks = ask(client, **fields, extra_body=extra, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content


def test_the_client_puts_a_stream_together(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "seed": 4}
    options: Any = {"include_usage": True}
    fields |= {"tool_choice": "required", "n": 2, "stream_options": options}
    with client.chat.completions.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert final.usage is not None and final.usage.completion_tokens
    for choice in final.choices:
        check_calls(choice.message.tool_calls)


def test_token_id_prompts_in_a_batch(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "max_tokens": 4, "temperature": 0, "stop": None}
    text = client.completions.create(prompt=["ab", "cd"], **fields)
    ids = [client_tokens(client, prompt) for prompt in ("ab", "cd")]
    same = client.completions.create(prompt=ids, **fields)
    assert [c.text for c in same.choices] == [c.text for c in text.choices]
    chunks = client.completions.create(prompt=ids, stream=True, **fields)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in text.choices]


def test_prompts_are_scored(client: openai.OpenAI) -> None:
    """What lm-eval asks for."""
    fields: Any = {"model": MODEL, "prompt": "hello", "logprobs": 1, "echo": True}
    for count in (0, 1):
        (choice,) = client.completions.create(**fields, max_tokens=count, temperature=0).choices
        assert choice.text.startswith("hello") and choice.logprobs is not None
        values = choice.logprobs.token_logprobs
        assert values is not None and len(values) == 5 + count
        assert values[0] is None and all(value <= 0 for value in values[1:] if value is not None)
    extra: Any = {"prompt_logprobs": 2, "cache_salt": "s", "priority": 1, "min_tokens": 3}
    reply: Any = client.completions.create(model=MODEL, prompt="hello", extra_body=extra)
    scores = reply.choices[0].prompt_logprobs
    assert scores[0] is None and len(scores) == 5 and all(len(s) >= 2 for s in scores[1:])


# -- structured output -----------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose texts are bounded, so that a random model comes to an end."""
    leaves: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 500)},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
        {"type": "string", "maxLength": rng.randint(0, 8)},
        {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        {"enum": ["red", "green", 3, None, {"a": [1]}]},
        {"const": "fixed é \N{SLIGHTLY SMILING FACE}"},
        {"type": ["string", "null"], "maxLength": 3},
    ]
    if depth >= 3 or (depth and rng.random() < 0.4):
        return rng.choice(leaves)
    kind = rng.choice(["object", "object", "array", "anyOf", "ref"]) if depth else "object"
    if kind == "array":
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": rng.randint(0, 1), "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "ref":
        return {"$ref": "#/$defs/shared"}
    names = rng.sample(["id", "name", "größe", "a b", 'quo"te', "x-y"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def test_random_schemas_are_followed(client: openai.OpenAI) -> None:
    """Fifty of them, four at a time."""

    def check(seed: int) -> None:
        schema = random_schema(random.Random(seed))
        schema["$defs"] = {"shared": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        choices = ask(client, response_format=form, seed=seed, n=2, max_completion_tokens=1500)
        for choice in choices.choices:
            assert choice.finish_reason == "stop", (seed, choice.message.content)
            jsonschema.validate(json.loads(choice.message.content), schema)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(50)))


class Person(pydantic.BaseModel):
    """What the client's `parse` makes a strict schema of."""

    is_old: bool
    grade: int = pydantic.Field(ge=0, le=99)


def test_the_client_parses_into_its_own_classes(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Person)
    assert isinstance(reply.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"structured_outputs": {"regex": "x{3}"}}, "xxx"),
        ({"structured_outputs": {"choice": ["p", "q"]}}, "p|q"),
    ],
    ids=str,
)
def test_vllm_s_ways_to_say_it(client: openai.OpenAI, extra: Any, pattern: str) -> None:
    reply = ask(client, n=3, extra_body=extra)
    assert all(re.fullmatch(pattern, c.message.content) for c in reply.choices), reply
    completion = client.completions.create(
        model=MODEL, prompt=["x", "y"], max_tokens=30, extra_body=extra
    )
    assert all(re.fullmatch(pattern, choice.text) for choice in completion.choices)


def test_a_bad_schema_is_the_client_s_error(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objec"}}}
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError, match="objec") as caught:
            ask(client, response_format=form, stream=is_streamed)
        assert caught.value.param == "response_format.json_schema.schema"


# -- tools -----------------------------------------------------------------------------------------


def check_calls(calls: Any) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for call in calls:
        assert call.id.startswith("call_") and call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def from_stream(chunks: Any) -> tuple[str, list[Any], str]:
    """Text, calls and finish reason, put together as clients do it."""
    text, reason = "", ""
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.index not in calls:
                assert call.id and call.type == "function" and call.function.name
                calls[call.index] = {"id": call.id, "name": call.function.name, "arguments": ""}
            else:
                assert call.id is None and call.function.name is None
            calls[call.index]["arguments"] += call.function.arguments or ""
    return text, list(calls.values()), reason


def test_required_calls(client: openai.OpenAI) -> None:
    reply = ask(client, tools=TOOLS, tool_choice="required", n=4, seed=1)
    for choice in reply.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls
        check_calls(choice.message.tool_calls)
    assert len({call.id for choice in reply.choices for call in choice.message.tool_calls}) > 4
    fields: Any = {"tools": TOOLS, "tool_choice": "required", "seed": 1}
    chunks = ask(client, **fields, stream=True)
    text, calls, reason = from_stream(chunks)
    (whole,) = ask(client, **fields).choices
    assert (text, reason) == ("", "tool_calls")
    found = [(call["name"], call["arguments"]) for call in calls]
    expected = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls]
    assert found == expected
    single = ask(client, **fields, parallel_tool_calls=False).choices[0].message
    assert len(single.tool_calls) == 1


def test_a_named_call_streams_its_arguments(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    fields: Any = {"tools": TOOLS, "tool_choice": choice, "seed": 2}
    (whole,) = ask(client, **fields).choices
    check_calls(whole.message.tool_calls)
    chunks = list(ask(client, **fields, stream=True))
    text, (call,), reason = from_stream(chunks)
    assert (text, call["name"], reason) == ("", "get_weather", "stop")
    assert call["arguments"] == whole.message.tool_calls[0].function.arguments
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 5


def test_calls_are_found_in_free_text(client: openai.OpenAI) -> None:
    """A random model is led to write them; the parser does not know that."""
    fields: Any = {"tools": TOOLS, "extra_body": {"guided_choice": [WRITTEN_CALLS]}}
    (choice,) = ask(client, **fields).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    weather, stop = choice.message.tool_calls
    assert weather.function.arguments == '{"city": "Rome", "unit": "C"}'
    assert (stop.function.name, stop.function.arguments) == ("stop", "{}")
    text, calls, reason = from_stream(ask(client, **fields, stream=True))
    assert (text, reason) == ("Let me see.", "tool_calls")
    assert [call["arguments"] for call in calls] == [weather.function.arguments, "{}"]
    (one,) = ask(client, **fields, parallel_tool_calls=False).choices
    assert len(one.message.tool_calls) == 1
    (none,) = ask(client, **fields, tool_choice="none").choices
    assert (none.message.content, none.message.tool_calls) == (WRITTEN_CALLS, None)
    assert none.finish_reason == "stop"


def test_the_results_of_calls_are_sent_back(client: openai.OpenAI) -> None:
    """This template refuses the role `tool`, so the prompt says it in words."""
    extra = {"guided_choice": [WRITTEN_CALLS]}
    answer = ask(client, tools=TOOLS, extra_body=extra).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in answer.tool_calls
    ]
    reply = ask(
        client,
        messages=[*MESSAGES, answer, *results],
        tools=TOOLS,
        max_tokens=3,
        max_completion_tokens=None,
    )
    assert reply.usage.prompt_tokens > len(WRITTEN_CALLS)
    assert reply.choices[0].finish_reason == "length"


def test_an_answer_has_its_form_unless_it_is_a_call(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    fields: Any = {"tools": TOOLS, "response_format": form}
    for first, is_call in (("<", True), ("{", False)):
        bias = {str(token): 100 for token in client_tokens(client, first)}
        reply = ask(client, **fields, n=4, logit_bias=bias, parallel_tool_calls=False)
        for choice in reply.choices:
            if is_call:
                assert choice.finish_reason == "tool_calls"
                check_calls(choice.message.tool_calls)
            else:
                jsonschema.validate(json.loads(choice.message.content), schema)


def test_plain_answers_beside_tools(client: openai.OpenAI) -> None:
    for is_streamed in (False, True):
        reply = ask(
            client, tools=TOOLS, extra_body={"guided_choice": ["Hello "]}, stream=is_streamed
        )
        if is_streamed:
            text, calls, reason = from_stream(reply)
            assert (text, calls, reason) == ("Hello ", [], "stop")
        else:
            assert reply.choices[0].message.content == "Hello "
            assert reply.choices[0].message.tool_calls is None
