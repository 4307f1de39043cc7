"""The names of fields, and what they all have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tierkv.engine.kv_hints import MOST_PRIORITY, KvHints

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "add_special_tokens": (False,),
    "functions": ([],),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields that are not served, with the values that ask for nothing."""

EMPTY: tuple[Any, ...] = (None, [])
"""Values of a message's other fields that say nothing."""

NOT_SERVED = (
    *NEUTRAL,
    "audio",
    "bad_words",
    "chat_template",
    "documents",
    "function_call",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "logits_processors",
    "metadata",
    "mm_processor_kwargs",
    "prediction",
    "reasoning_effort",
    "request_id",
    "return_token_ids",
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


class Model(BaseModel):
    """Strict types (no "5" for 5, no true for 1) and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class HintsBody(Model):
    """What a request says of its own KV (`KvHints`)."""

    ttl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)] | None = None
    no_store: bool | None = None
    session_id: str | None = None
    turn: Literal["end", "tool_call"] | None = None

    def given(self) -> KvHints | None:
        """As the engine takes them."""
        return KvHints.parse(self.model_dump(exclude_none=True))
