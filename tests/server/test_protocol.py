"""Bodies become sampling parameters; what is not served is refused by name."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tierkv.engine.async_llm import AsyncLLM
from tierkv.engine.grammar_params import StructuredOutputsParams
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import RequestError
from tierkv.server.fields import NOT_SERVED
from tierkv.server.parsing import parse_body
from tierkv.server.protocol import ChatBody, CompletionBody

MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionBody:
    return parse_body(json.dumps({"prompt": "x", **fields}).encode(), CompletionBody)


def chat(**fields: Any) -> ChatBody:
    return parse_body(json.dumps({"messages": MESSAGES, **fields}).encode(), ChatBody)


def test_defaults_are_those_of_openai() -> None:
    assert completion().params() == SamplingParams(max_tokens=16)
    assert chat().params() == SamplingParams(max_tokens=None)


def test_every_sampling_field_arrives() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "prompt_logprobs": 1,
        "logit_bias": {"5": -1.5},
        "allowed_token_ids": [1, 2],
        "truncate_prompt_tokens": 7,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    expected = SamplingParams(**{**fields, "logit_bias": {5: -1.5}})
    assert completion(**fields).params() == expected
    assert chat(**fields).params() == expected


def test_null_means_not_given() -> None:
    names = [*CompletionBody.model_fields, *NOT_SERVED]
    nulls = {name: None for name in names if name != "prompt"}
    assert completion(**nulls).params() == SamplingParams(max_tokens=16)
    assert completion(**nulls).priority == 0


def test_what_identifies_the_caller_is_taken() -> None:
    given = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
    assert chat(**given, metadata={"run": "1"}).params() == chat().params()


def test_prompt_logprobs_are_not_streamed_by_chats() -> None:
    with pytest.raises(RequestError, match="needs stream=false") as caught:
        chat(prompt_logprobs=1, stream=True)
    assert caught.value.field == "prompt_logprobs"


def test_a_schema_must_be_meant() -> None:
    schema = {"name": "x", "schema": {}}
    with pytest.raises(RequestError, match="must be json_schema") as caught:
        chat(response_format={"type": "json_object", "json_schema": schema})
    assert caught.value.field == "response_format.type"


def test_vllm_s_structured_outputs_with_all_their_fields() -> None:
    empty = {"json": None, "choice": None, "whitespace_pattern": None, "disable_fallback": False}
    body = completion(structured_outputs={**empty, "regex": "a"})
    assert body.params().structured_outputs == StructuredOutputsParams(regex="a")


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match="is not served") as caught:
        chat(**{name: {"something": "real"}})
    assert caught.value.field == name


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).params().max_tokens == 7
    assert chat(max_tokens=5).params().max_tokens == 5


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    empty = dict.fromkeys(("refusal", "audio", "function_call", "annotations"))
    answer = {"role": "assistant", "content": "yes", "tool_calls": [], **empty}
    body = chat(messages=[*MESSAGES, answer])
    assert body.template_input() == [*MESSAGES, {"role": "assistant", "content": "yes"}]
    with pytest.raises(RequestError, match="is required") as caught:
        chat(messages=[{**answer, "tool_calls": [{"id": "1"}]}])
    assert caught.value.field == "messages[0].tool_calls[0].function"


@pytest.mark.parametrize("owner", [AsyncLLM.chat, PreTrainedTokenizerBase.apply_chat_template])
def test_a_template_cannot_be_given_arguments_of_ours(owner: Any) -> None:
    parameters = inspect.signature(owner).parameters.values()
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in names:
        with pytest.raises(RequestError, match="cannot be set by a request"):
            chat(chat_template_kwargs={name: "x"})


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompt_forms(value: Any, prompts: list[Any]) -> None:
    assert completion(prompt=value).prompts() == prompts


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
field_names = st.sampled_from([*CompletionBody.model_fields, *ChatBody.model_fields, *NOT_SERVED])


@given(st.dictionaries(field_names | st.text(min_size=1, max_size=4), json_values, max_size=5))
def test_any_body_is_taken_or_refused_with_a_field(values: dict[str, Any]) -> None:
    for kind in (CompletionBody, ChatBody):
        try:
            body = parse_body(json.dumps(values).encode(), kind)
            assert isinstance(body.params(), SamplingParams)
        except RequestError as error:
            assert error.field


@given(st.binary(max_size=40))
def test_any_bytes_are_taken_or_refused(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_body(raw, ChatBody)  # no forty random bytes make a conversation
