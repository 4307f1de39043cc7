"""The names of fields, and what they all have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from tierkv.engine.kv_hints import MOST_PRIORITY, KvHints

NULL = {"type": "null"}

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "add_special_tokens": (False,),
    "bad_words": ([],),
    "functions": ([],),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""Fields that are not served, with the values that ask for nothing."""

EMPTY: tuple[Any, ...] = (None, [])
"""Values of a message's other fields that say nothing."""

NOT_SERVED = (
    *NEUTRAL,
    "audio",
    "chat_template",
    "documents",
    "function_call",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "mm_processor_kwargs",
    "prediction",
    "request_id",
    "web_search_options",
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
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
"""Fields that go to `SamplingParams` under their own name."""

BEAM_FIELDS = (
    "n",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
)
"""Those of them that a beam search knows too."""

TEMPLATE_RESERVED = (
    "self",
    "messages",
    "sampling_params",
    "request_id",
    "priority",
    "cache_salt",
    "delta",
    "beam_search",
    "kv_hints",
    "tenant",
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


TEXT, LIST = "<text>", "<list>"
"""Tags of what may be text or a list."""


def text_or_list(value: Any) -> str | None:
    """The tag of a value that may be text or a list."""
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


TextOrList = Discriminator(
    text_or_list, custom_error_type="text_or_list", custom_error_message="text or a list"
)
Stop = Annotated[Annotated[str, Tag(TEXT)] | Annotated[list[str], Tag(LIST)], TextOrList]


def whole_number(value: Any) -> Any:
    """16.0 as 16: JSON has one kind of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole_number)]


def is_neutral(value: Any, known: Iterable[Any]) -> bool:
    """Whether the value is a known one that asks for nothing; in Python, 0 equals False."""
    return any(value == each and type(value) is type(each) for each in known)


def allow_nulls(schema: dict[str, Any]) -> None:
    """Say in a model's JSON schema that null means not given, for unknown fields too."""
    schema["additionalProperties"] = NULL
    for name, found in schema.get("properties", {}).items():
        kinds = found.get("anyOf", ())
        if name not in schema.get("required", ()) and NULL not in kinds:
            schema["properties"][name] = {"anyOf": [found, NULL]}


class Model(BaseModel):
    """Strict types (no "5" for 5, no true for 1), and no unknown fields unless they are null."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=allow_nulls)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, values: Any) -> Any:
        """Leave out null fields: clients send back what they got, with every field they know."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class HintsBody(Model):
    """What a request says of its own KV (`KvHints`)."""

    ttl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    priority: (
        Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY), BeforeValidator(whole_number)]
        | None
    ) = None
    no_store: bool | None = None
    session_id: str | None = None
    turn: Literal["end", "tool_call"] | None = None

    def given(self) -> KvHints | None:
        """As the engine takes them."""
        return KvHints.parse(self.model_dump(exclude_none=True))
