"""How to sample, and when to stop: the request fields of vLLM and the OpenAI API, checked."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, fields
from typing import Any

from tierkv.engine.grammar_params import StructuredOutputsParams
from tierkv.errors import RequestError

MAX_LOGPROBS = 1024
_MAX_INTEGER = 2**63 - 1  # what a message to the engine process can carry
_SWITCHES = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; names and defaults follow vLLM.

    Attributes:
        n: parallel samples of the prompt.
        temperature: 0 means greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p.
        min_p: drop tokens less likely than min_p times the most likely one.
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens, in [-2, 2].
        repetition_penalty: CTRL's (Keskar et al. 2019), over prompt and generated tokens, > 0.
        seed: makes this request's samples reproducible.
        stop: strings that end the output (excluded from it unless `include_stop_str_in_output`).
        stop_token_ids: token ids that end the output.
        ignore_eos: do not stop at the end-of-sequence token.
        max_tokens: generated tokens at most; None means up to the context's end.
        min_tokens: no end-of-sequence, stop id or stop string before so many tokens.
        logprobs: log-probabilities of the k best tokens at each generated position.
        prompt_logprobs: the same for each prompt position (the prompt is then computed anew).
        logit_bias: token id -> value added to its logit.
        allowed_token_ids: no other token is generated.
        structured_outputs: what the output must be; a mapping is taken for its fields.
        truncate_prompt_tokens: only so many of the prompt's last tokens are used; -1 for as many
            as leave room for `max_tokens`.
        detokenize: whether to produce text.
        skip_special_tokens, spaces_between_special_tokens: as in transformers' `decode`.

    Raises:
        RequestError: a value is out of range; names the field, the value and the fix.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = _as_list("stop", self.stop)
        self.stop_token_ids = _as_list("stop_token_ids", self.stop_token_ids)
        _check_integers(self)
        _check_floats(self)
        _check_switches(self)
        _check_stops(self)
        _check_logit_bias(self)
        _check_limits(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> SamplingParams:
        """Build from a plain dict (a wire message); unknown names raise RequestError."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(name, values[name], "unknown sampling parameter")
        return cls(**values)


def _check_integers(p: SamplingParams) -> None:
    _integer("n", p.n, 1, 1024)
    _integer("top_k", p.top_k, -1, _MAX_INTEGER)
    _integer("min_tokens", p.min_tokens, 0, _MAX_INTEGER)
    if p.max_tokens is not None:
        _integer("max_tokens", p.max_tokens, 1, _MAX_INTEGER)
        if p.min_tokens > p.max_tokens:
            fix = f"must be at most max_tokens={p.max_tokens}"
            raise RequestError("min_tokens", p.min_tokens, fix)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(p, name) is not None:
            _integer(name, getattr(p, name), 0, MAX_LOGPROBS)
    if p.seed is not None:
        _integer("seed", p.seed, -(2**63), _MAX_INTEGER)


def _check_floats(p: SamplingParams) -> None:
    _number("temperature", p.temperature, 0.0, 100.0)
    _number("top_p", p.top_p, 0.0, 1.0)
    if p.top_p == 0.0:
        raise RequestError("top_p", p.top_p, "must be above 0 and at most 1")
    _number("min_p", p.min_p, 0.0, 1.0)
    _number("presence_penalty", p.presence_penalty, -2.0, 2.0)
    _number("frequency_penalty", p.frequency_penalty, -2.0, 2.0)
    _number("repetition_penalty", p.repetition_penalty, 0.0, 100.0)
    if p.repetition_penalty == 0.0:
        raise RequestError("repetition_penalty", 0.0, "must be above 0; 1.0 means none")


def _check_switches(p: SamplingParams) -> None:
    for name in _SWITCHES:
        if not isinstance(getattr(p, name), bool):
            raise RequestError(name, getattr(p, name), "must be True or False")


def _check_stops(p: SamplingParams) -> None:
    for text in p.stop:
        if not isinstance(text, str) or not text:
            raise RequestError("stop", text, "stop strings must be non-empty strings")
    for token_id in p.stop_token_ids:
        _integer("stop_token_ids", token_id, 0, _MAX_INTEGER)
    if p.stop and not p.detokenize:
        raise RequestError("stop", p.stop, "stop strings need detokenize=True")


def _check_logit_bias(p: SamplingParams) -> None:
    if p.logit_bias is None:
        return
    if not isinstance(p.logit_bias, dict):
        raise RequestError("logit_bias", p.logit_bias, "must map token ids to numbers")
    given: dict[Any, Any] = p.logit_bias
    bias: dict[int, float] = {}
    for token_id, value in given.items():
        try:
            token = int(token_id) if isinstance(token_id, str) else operator.index(token_id)
            bias[token] = float(value)
        except (TypeError, ValueError, OverflowError):
            fix = "must map token ids to numbers"
            raise RequestError("logit_bias", {token_id: value}, fix) from None
        _integer("logit_bias", token, 0, _MAX_INTEGER)
        if math.isnan(bias[token]):
            raise RequestError("logit_bias", {token_id: value}, "must not be NaN")
    p.logit_bias = bias


def _check_limits(p: SamplingParams) -> None:
    if p.allowed_token_ids is not None:
        p.allowed_token_ids = _as_list("allowed_token_ids", p.allowed_token_ids)
        if not p.allowed_token_ids:
            raise RequestError("allowed_token_ids", [], "must allow at least one token")
        for token_id in p.allowed_token_ids:
            _integer("allowed_token_ids", token_id, 0, _MAX_INTEGER)
    if p.truncate_prompt_tokens is not None:
        _integer("truncate_prompt_tokens", p.truncate_prompt_tokens, -1, _MAX_INTEGER)
        if p.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens", 0, "must be at least 1, or -1")
    wanted: Any = p.structured_outputs
    if isinstance(wanted, dict):
        p.structured_outputs = StructuredOutputsParams.from_mapping(wanted)
    elif wanted is not None and not isinstance(wanted, StructuredOutputsParams):
        fix = "must be StructuredOutputsParams, or a dict of its fields"
        raise RequestError("structured_outputs", wanted, fix)


def _as_list(name: str, value: Any) -> list[Any]:
    """None and any collection as a list; a lone number is a mistake."""
    if value is None:
        return []
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    raise RequestError(name, value, "must be a list")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, value, "must be an integer")
    if not low <= value <= high:
        is_open = high == _MAX_INTEGER and value < low
        bound = f"at least {low}" if is_open else f"between {low} and {high}"
        raise RequestError(name, value, f"must be {bound}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(name, value, "must be a number")
    if not low <= value <= high:  # also catches NaN
        raise RequestError(name, value, f"must be between {low} and {high}")
