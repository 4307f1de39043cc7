"""What clients send: OpenAI's request bodies with vLLM's extra fields, checked field by field.

Only what is real is accepted. A field of OpenAI's API that changes nothing at the value given
(`tools: []`) passes; any other field that is not served is an error that names it.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tierkv.engine.inputs import join_text_parts
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import RequestError

Body = TypeVar("Body", bound="GenerationBody")

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "store": (False,),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
}
"""Fields that are not served, with the values that ask for nothing."""

EMPTY: tuple[Any, ...] = (None, [])
"""Values of a message's other fields that say nothing."""

NOT_SERVED = (
    *NEUTRAL,
    "audio",
    "function_call",
    "metadata",
    "prediction",
    "reasoning_effort",
    "web_search_options",
    "guided_json",
    "guided_regex",
    "structured_outputs",
    "use_beam_search",
)
"""Fields of OpenAI's and vLLM's API that are refused by name."""

SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "logit_bias",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
"""Fields that go to `SamplingParams` under their own name."""

TEMPLATE_RESERVED = (
    "self",
    "messages",
    "sampling_params",
    "request_id",
    "priority",
    "cache_salt",
    "delta",
    "conversation",
    "chat_template",
    "tokenize",
    "tokenizer_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tools",
    "truncation",
)
"""Arguments of `AsyncLLM.chat` and `apply_chat_template` that a request may not set."""


class Model(BaseModel):
    """Strict types (no "5" for 5, no true for 1) and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Model):
    """`include_usage` adds a last chunk with the token counts."""

    include_usage: bool = False


class GenerationBody(Model):
    """The fields that both kinds of completions share; null means not given."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = 0
    cache_salt: str | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, values: Any) -> Any:
        """Leave out null and neutral values of fields that are not served."""
        if not isinstance(values, dict):
            return values
        served = cls.model_fields
        return {
            name: value
            for name, value in values.items()
            if name in served or not (value is None or value in NEUTRAL.get(name, ()))
        }

    @model_validator(mode="after")
    def check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "given", "needs stream=true")
        return self

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def public_name(self, field: str) -> str:
        """The body's field for a field of the engine's request."""
        return field

    def sampling_values(self) -> dict[str, Any]:
        """What was given for `SamplingParams`."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        return {name: value for name, value in given.items() if value is not None}


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`. `max_tokens` 0 needs `echo` and only scores the prompt."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def check_best_of(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise RequestError("best_of", self.best_of, "is not served: leave it out or give n")
        return self

    def public_name(self, field: str) -> str:
        return "prompt" if field == "prompt_token_ids" else field

    @property
    def is_score_only(self) -> bool:
        """Nothing is to be generated: the prompt and its log-probabilities are the answer."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self) -> SamplingParams:
        """The sampling parameters asked for."""
        values = self.sampling_values()
        if self.max_tokens is not None:
            values["max_tokens"] = 1 if self.is_score_only else self.max_tokens
        if self.logprobs is not None:
            values["logprobs"] = self.logprobs
            if self.echo:
                values.setdefault("prompt_logprobs", self.logprobs)
        return SamplingParams(**values)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several: strings or lists of token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            refuse_prompt(prompt)
        if all(is_token_id(item) for item in prompt):
            return [prompt]
        for item in prompt:
            if not isinstance(item, str) and not is_token_list(item):
                refuse_prompt(prompt)
        return prompt


class Message(Model):
    """One message of a conversation; content is text or a list of text parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_what_says_nothing(cls, values: Any) -> Any:
        """Leave out empty fields of an answer that a client sends back (`refusal: null`)."""
        if not isinstance(values, dict):
            return values
        served = cls.model_fields
        return {
            name: value for name, value in values.items() if name in served or value not in EMPTY
        }

    def as_template_input(self, place: str) -> dict[str, Any]:
        """The message as chat templates take it: text parts joined by newlines."""
        if self.content is None:
            raise RequestError(f"{place}.content", None, "must be text")
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if isinstance(self.content, list):
            message["content"] = join_text_parts(self.content, f"{place}.content")
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_chat(self) -> Self:
        if not self.messages:
            raise RequestError("messages", [], "must hold at least one message")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", self.top_logprobs, "needs logprobs=true")
        for name in self.chat_template_kwargs or {}:
            if name in TEMPLATE_RESERVED:
                raise RequestError("chat_template_kwargs", name, "cannot be set by a request")
        return self

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
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        return names.get(field, field)

    def template_input(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        return [
            message.as_template_input(f"messages[{i}]") for i, message in enumerate(self.messages)
        ]


def refuse_prompt(prompt: Any) -> NoReturn:
    """Raise because `prompt` has none of the forms allowed."""
    fix = "must be a non-empty string, list of strings, list of token ids, or list of such lists"
    raise RequestError("prompt", prompt, fix)


def is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(is_token_id(item) for item in value)


def parse_body(raw: bytes, body: type[Body]) -> Body:
    """The request body as an object of type `body`.

    Raises:
        RequestError: not JSON, not an object, or a field that is wrong; names it.
    """
    try:
        values = json.loads(raw, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError("body", describe(raw), f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError("body", values, "must be a JSON object")
    refuse_half_characters(raw, values)
    try:
        return body.model_validate(values)
    except ValidationError as error:
        raise request_error(error, body) from None


def refuse_constant(name: str) -> NoReturn:
    """JSON has no NaN and no Infinity, though Python's parser takes them."""
    raise ValueError(f"{name} is not a JSON value")


def refuse_half_characters(raw: bytes, values: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair, which is no text and which tokenizers refuse."""
    if b"\\ud" not in raw.lower():
        return
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("body", "\\ud...", "holds half of a surrogate pair") from None


def describe(raw: bytes) -> str:
    return raw[:60].decode(errors="replace")


def request_error(error: ValidationError, body: type[GenerationBody]) -> RequestError:
    """The first complaint of pydantic as an error that names the field."""
    first, *others = error.errors(include_url=False)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "extra_forbidden":
        return RequestError(place(first["loc"]), first["input"], unknown_field(first["loc"], body))
    if first["type"] == "missing":
        return RequestError(place(first["loc"]), None, "is required")
    # A union complains once per member; the field is what the client knows.
    same = [first, *(e for e in others if e["loc"][:1] == first["loc"][:1])]
    wants = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in same))
    where = place(first["loc"]) if len(same) == 1 else name
    return RequestError(where, first["input"], f"must be {wants}")


def place(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` -> `messages[0].role`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def unknown_field(location: tuple[int | str, ...], body: type[GenerationBody]) -> str:
    """What to say of a field that no body has."""
    name = str(location[-1])
    if name in NOT_SERVED or len(location) > 1:
        return "is not served"
    near = difflib.get_close_matches(name, list(body.model_fields), n=1)
    return "is no field of this request" + (f"; did you mean {near[0]}?" if near else "")
