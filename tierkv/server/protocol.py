"""What clients send: OpenAI's request bodies with vLLM's extra fields, checked field by field.

Only what is real is accepted. A field of OpenAI's API that changes nothing at the value given
(`tools: []`) passes; any other field that is not served is an error that names it.
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn, Self

from pydantic import PrivateAttr, model_validator

from tierkv.engine.beam import BeamSearchParams
from tierkv.engine.grammar_params import StructuredOutputsParams
from tierkv.engine.kv_hints import KvHints
from tierkv.engine.outputs import CompletionOutput
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import RequestError
from tierkv.server.fields import (
    BEAM_FIELDS,
    NEUTRAL,
    SAMPLING_FIELDS,
    TEMPLATE_RESERVED,
    HintsBody,
    Model,
    Stop,
    Whole,
    is_neutral,
    whole_number,
)
from tierkv.server.structured import FIELDS, Form, ResponseFormat, StructuredOutputs, form_of
from tierkv.server.tools_body import Message, NamedChoice, Tool, ToolChoice, check_tools

_LONGEST = 2**31  # tokens: up to the end of the context


class StreamOptions(Model):
    """`include_usage` adds a last chunk with the token counts; `continuous_usage_stats` (vLLM's)
    puts the counts so far into every chunk as well. There is no obfuscation to turn off."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None


class CommonFields(Model):
    """What every kind of body says of sampling and of its KV in the same words; null means not
    given."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Whole | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    logit_bias: dict[str, float] | None = None
    priority: Whole = 0
    cache_salt: str | None = None
    kv_hints: HintsBody | None = None


class GenerationBody(CommonFields):
    """The fields that both kinds of completions share; null means not given."""

    model: str | None = None
    n: Whole | None = None
    stop: Stop | None = None
    max_tokens: Whole | None = None
    prompt_logprobs: Whole | None = None
    allowed_token_ids: list[Whole] | None = None
    truncate_prompt_tokens: Whole | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    echo: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    _form: Form | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, values: Any) -> Any:
        """Leave out neutral values of fields that are not served."""
        if not isinstance(values, dict):
            return values
        served = cls.model_fields
        return {
            name: value
            for name, value in values.items()
            if name in served or not is_neutral(value, NEUTRAL.get(name, ()))
        }

    @model_validator(mode="after")
    def check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "given", "needs stream=true")
        return self

    @model_validator(mode="after")
    def check_form_and_search(self) -> Self:
        self._form = form_of(self)
        if self.use_beam_search:
            refuse_beside_search(self)
        elif self.length_penalty is not None:
            raise RequestError("length_penalty", self.length_penalty, "needs use_beam_search=true")
        return self

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_in_chunks(self) -> bool:
        return self.wants_usage_chunk and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def shows(self, sample: CompletionOutput) -> bool:
        """Whether a delta has news: tokens may be held back until they are whole characters."""
        ids = self.return_token_ids and sample.token_ids
        return bool(sample.text or sample.logprobs or sample.finished or ids)

    def hints(self) -> KvHints | None:
        """What was said of the request's own KV."""
        return None if self.kv_hints is None else self.kv_hints.given()

    def public_name(self, field: str) -> str:
        """The body's field for a field of the engine's request."""
        if self._form is not None and field.startswith("structured_outputs"):
            return self._form.public_name(field)
        return "n" if field == "beam_width" else field

    def sampling_values(self) -> dict[str, Any]:
        """What was given for `SamplingParams`."""
        names = BEAM_FIELDS if self.use_beam_search else SAMPLING_FIELDS
        given = {name: getattr(self, name) for name in names}
        if self._form is not None:
            given["structured_outputs"] = self._form.params
        return {name: value for name, value in given.items() if value is not None}

    def beam_search(self) -> BeamSearchParams | None:
        """The search asked for; None for samples."""
        if not self.use_beam_search:
            return None
        limit = self.params().max_tokens
        return BeamSearchParams(
            beam_width=self.n or 1,
            max_tokens=_LONGEST if limit is None else limit,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            ignore_eos=bool(self.ignore_eos),
            temperature=self.temperature or 0.0,
        )

    def params(self) -> SamplingParams:
        """The sampling parameters asked for."""
        raise NotImplementedError


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`. `max_tokens` 0 needs `echo` and only scores the prompt."""

    prompt: Any = None
    add_special_tokens: bool | None = None
    logprobs: Whole | None = None
    best_of: Whole | None = None

    @model_validator(mode="after")
    def check_best_of(self) -> Self:
        if self.best_of is None or self.best_of == self.num_choices:
            return self
        if self.best_of < self.num_choices:
            fix = f"must be at least n={self.num_choices}"
            raise RequestError("best_of", self.best_of, fix)
        if self.stream:
            fix = "needs stream=false: which samples are best is known at their end"
            raise RequestError("best_of", self.best_of, fix)
        if self.use_beam_search:
            raise RequestError("best_of", self.best_of, "cannot be combined with use_beam_search")
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def is_best_of(self) -> bool:
        """More samples are drawn than are shown."""
        return self.best_of is not None and self.best_of > self.num_choices

    def public_name(self, field: str) -> str:
        if field == "n" and self.is_best_of:
            return "best_of"
        return "prompt" if field == "prompt_token_ids" else super().public_name(field)

    @property
    def is_score_only(self) -> bool:
        """Nothing is to be generated: the prompt and its log-probabilities are the answer."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self) -> SamplingParams:
        values = self.sampling_values()
        if self.max_tokens == 0 and not self.echo:
            fix = "needs echo=true, which scores the prompt; else it must be at least 1"
            raise RequestError("max_tokens", 0, fix)
        if self.max_tokens is not None:
            values["max_tokens"] = 1 if self.is_score_only else self.max_tokens
        if self.is_best_of:
            values |= {"n": self.best_of, "logprobs": 0}  # the best are found by these
        if self.logprobs is not None:
            values["logprobs"] = self.logprobs
            if self.echo:
                values.setdefault("prompt_logprobs", self.logprobs)
        return SamplingParams(**values)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several: strings or lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not isinstance(self.prompt, list) or not self.prompt:
            refuse_prompt(self.prompt)
        prompt = whole_numbers(self.prompt)
        if all(is_token_id(item) for item in prompt):
            return [prompt]
        prompts = [whole_numbers(item) if isinstance(item, list) else item for item in prompt]
        for item in prompts:
            if not isinstance(item, str) and not is_token_list(item):
                refuse_prompt(prompts)
        return prompts


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def check_chat(self) -> Self:
        if not self.messages:
            raise RequestError("messages", [], "must hold at least one message")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", self.top_logprobs, "needs logprobs=true")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs", self.prompt_logprobs, "needs stream=false")
        if self.continue_final_message and self.add_generation_prompt:
            fix = "needs add_generation_prompt=false: the last message is not over"
            raise RequestError("continue_final_message", True, fix)
        for name in self.chat_template_kwargs or {}:
            if name in TEMPLATE_RESERVED:
                raise RequestError("chat_template_kwargs", name, "cannot be set by a request")
        return self

    @model_validator(mode="after")
    def check_tool_choice(self) -> Self:
        check_tools(self.tools or [], self.tool_choice)
        if self._form is not None and self.tools and self.forces_call:
            fix = "cannot be combined with a forced tool_choice"
            raise RequestError(self._form.field, "given", fix)
        if self.forces_call and self.use_beam_search:
            raise RequestError("tool_choice", "given", "cannot be combined with use_beam_search")
        return self

    @property
    def form_of_answers(self) -> StructuredOutputsParams | None:
        """What an answer must be when it is no call: `response_format` is of answers alone."""
        form = self._form
        is_answers = form is not None and form.field.startswith("response_format")
        return form.params if form is not None and is_answers else None

    @property
    def forces_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)

    def params(self) -> SamplingParams:
        """The sampling parameters asked for; no limit means up to the end of the context."""
        values = self.sampling_values()
        limit = self.max_completion_tokens
        values["max_tokens"] = self.max_tokens if limit is None else limit
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        return SamplingParams(**values)

    def public_name(self, field: str) -> str:
        if field == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        if self.forces_call and field.startswith("structured_outputs"):
            return "tools"
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        return names.get(field) or super().public_name(field)

    def template_input(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        return [
            message.as_template_input(f"messages[{i}]") for i, message in enumerate(self.messages)
        ]


def refuse_beside_search(body: GenerationBody) -> None:
    """Raise for what a beam search cannot do."""
    if body.stream:
        fix = "cannot be combined with use_beam_search: its answers are known at the end"
        raise RequestError("stream", True, fix)
    defaults = SamplingParams()
    names = [name for name in SAMPLING_FIELDS if name not in (*BEAM_FIELDS, "temperature")]
    for name in (*names, "logprobs", *FIELDS):
        value = getattr(body, name, None)
        if value not in (None, False, [], {}) and value != getattr(defaults, name, None):
            raise RequestError(name, value, "cannot be combined with use_beam_search")


def refuse_prompt(prompt: Any) -> NoReturn:
    """Raise because `prompt` has none of the forms allowed."""
    fix = "must be a non-empty string, list of strings, list of token ids, or list of such lists"
    raise RequestError("prompt", prompt, fix)


def whole_numbers(items: list[Any]) -> list[Any]:
    """The items, numbers like 16.0 as integers."""
    return [whole_number(item) for item in items] if float in map(type, items) else items


def is_token_id(value: object) -> bool:
    """Whether it is a number that a message to the engine can carry."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(is_token_id(item) for item in value)
