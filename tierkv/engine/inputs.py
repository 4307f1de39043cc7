"""What users give, checked and brought into one form: prompts, conversations, parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tierkv.engine.beam import BeamSearchParams
from tierkv.engine.core import EngineInfo, EngineRequest
from tierkv.engine.kv_hints import KvHints
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import RequestError

Prompt = str | list[int] | Mapping[str, Any]
"""Text, token ids, or `{"prompt": str}` / `{"prompt_token_ids": [...]}`, each with an optional
`"cache_salt"`; the text also with `"add_special_tokens"`, which is True unless given."""

_PROMPT_FORMS = 'a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}'
_ANY_LENGTH = 2**20
"""Characters that are always tokenised: counting the tokens of a long text is no mistake."""

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt", "add_special_tokens"}


@dataclass(slots=True)
class ParsedPrompt:
    """A prompt as text, as token ids, or both (the ids are then the text's)."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str = ""
    add_special_tokens: bool = True
    tenant: str = ""
    hints: KvHints | None = None
    beam: BeamSearchParams | None = None


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """One prompt in any of its forms.

    Raises:
        RequestError: it has none of them.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if isinstance(prompt, (list, tuple)):
        return ParsedPrompt(None, _token_ids(prompt))
    raise RequestError("prompt", prompt, f"must be {_PROMPT_FORMS}")


def parse_prompts(prompts: Prompt | Iterable[Prompt]) -> list[ParsedPrompt]:
    """One prompt or a list of them; a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [parse_prompt(prompts)]
    given: Any = prompts
    if not isinstance(given, Iterable) or isinstance(given, (bytes, bytearray)):
        raise RequestError("prompts", given, f"must be {_PROMPT_FORMS}, or a list of these")
    items: list[Any] = list(given)
    if items and all(isinstance(item, int) for item in items):
        return [parse_prompt(items)]
    return [parse_prompt(item) for item in items]


def _parse_mapping(prompt: Mapping[str, Any]) -> ParsedPrompt:
    for name in prompt:
        if name not in _PROMPT_KEYS:
            fix = f"unknown key of a prompt; known are {', '.join(sorted(_PROMPT_KEYS))}"
            raise RequestError(str(name), prompt[name], fix)
    salt = prompt.get("cache_salt") or ""
    if not isinstance(salt, str):
        raise RequestError("cache_salt", salt, "must be a string")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError("prompt", text, "must be a string")
    if text is None and ids is None:
        raise RequestError("prompt", dict(prompt), f"must be {_PROMPT_FORMS}")
    adds = prompt.get("add_special_tokens", True)
    if not isinstance(adds, bool):
        raise RequestError("add_special_tokens", adds, "must be True or False")
    return ParsedPrompt(text, None if ids is None else _token_ids(ids), salt, adds)


def _token_ids(values: Any) -> list[int]:
    try:
        found = list(values)
        if isinstance(values, (str, bytes, bytearray)) or bool in map(type, found):
            raise TypeError
        return [operator.index(value) for value in found]
    except TypeError:
        raise RequestError("prompt_token_ids", values, "must be a list of integers") from None


def parse_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation (a list of messages) or a list of conversations."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages", messages, "must be a non-empty list of messages")
    conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise RequestError("messages", conversation, "must be a non-empty list of messages")
        for message in conversation:
            if not isinstance(message, Mapping) or "role" not in message:
                fix = 'must be {"role": ..., "content": ...}'
                raise RequestError("messages", message, fix)
    return [[_plain_message(message) for message in each] for each in conversations]


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is text: parts become lines, as chat templates want them."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    return {**message, "content": join_text_parts(content, "messages")}


def join_text_parts(parts: Iterable[Any], field: str) -> str:
    """The text of OpenAI's content parts, one line for each.

    Raises:
        RequestError: a part is something else than text; names `field`.
    """
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            fix = 'only parts {"type": "text", "text": "..."} are served'
            raise RequestError(field, kind, fix)
        texts.append(text)
    return "\n".join(texts)


def parse_params(
    params: SamplingParams | Iterable[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Sampling parameters for `count` prompts: the defaults, one for all, or one for each."""
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    found = list(params)
    for entry in found:
        if not isinstance(entry, SamplingParams):
            raise RequestError("sampling_params", entry, "must be SamplingParams")
    if len(found) != count:
        fix = f"{len(found)} were given for {count} prompts: give one for all, or one for each"
        raise RequestError("sampling_params", f"<list of {len(found)}>", fix)
    return found


def _check_unicode(field: str, text: str) -> None:
    """Python strings may hold lone surrogates (half of a UTF-16 pair), which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(field, text, f"is not valid Unicode: {error}") from None


class InputProcessor:
    """Makes engine requests of what users give.

    Raises (from every method):
        RequestError: naming the field, the value and the fix.
    """

    def __init__(self, tokenizer: Tokenizer | None, info: EngineInfo) -> None:
        self.tokenizer = tokenizer
        self._info = info

    def require_tokenizer(self, field: str, value: object) -> Tokenizer:
        if self.tokenizer is None:
            fix = "the model has no tokenizer: give prompt_token_ids"
            raise RequestError(field, value, fix)
        return self.tokenizer

    def tokenize(self, prompt: ParsedPrompt) -> list[int]:
        """The prompt's ids; may take a millisecond per thousand characters."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        assert prompt.text is not None
        tokenizer = self.require_tokenizer("prompt", prompt.text)
        self._check_length(prompt.text, tokenizer)
        _check_unicode("prompt", prompt.text)
        return tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)

    def request(
        self, request_id: str, prompt: ParsedPrompt, params: SamplingParams, priority: int = 0
    ) -> EngineRequest:
        """Tokenise and check one request."""
        self._check_params(params)
        if prompt.beam is not None and params.n != prompt.beam.beam_width:
            fix = f"must be the width of the beam search, {prompt.beam.beam_width}"
            raise RequestError("n", params.n, fix)
        _check_unicode("request_id", request_id)
        _check_unicode("cache_salt", prompt.cache_salt)
        is_integer = isinstance(priority, int) and not isinstance(priority, bool)
        if not is_integer or not -(2**63) <= priority < 2**63:
            raise RequestError("priority", priority, "must be an integer of 64 bits")
        token_ids = self._truncate(prompt, self.tokenize(prompt), params)
        return EngineRequest(
            request_id,
            token_ids,
            params,
            priority,
            prompt.cache_salt,
            tenant=prompt.tenant,
            hints=prompt.hints,
            beam=prompt.beam,
        )

    def _truncate(
        self, prompt: ParsedPrompt, token_ids: list[int], params: SamplingParams
    ) -> list[int]:
        """The last tokens of the prompt, and its text likewise, as far as they are asked for."""
        most = params.truncate_prompt_tokens
        if most == -1:
            most = max(1, self._info.max_model_len - (params.max_tokens or 1))
        if most is None or len(token_ids) <= most:
            return token_ids
        if prompt.text is not None:
            prompt.text = self.require_tokenizer("prompt", "").decode(token_ids[-most:])
        return token_ids[-most:]

    def chat_prompt(self, messages: list[dict[str, Any]], **options: Any) -> ParsedPrompt:
        """The prompt of a conversation; `options` are those of `Tokenizer.chat_text`."""
        tokenizer = self.require_tokenizer("messages", messages)
        text = tokenizer.chat_text(messages, **options)
        return ParsedPrompt(text, None, add_special_tokens=False)  # the template wrote them

    def _check_length(self, text: str, tokenizer: Tokenizer) -> None:
        """Refuse a text that cannot fit before it costs a minute and gigabytes to tokenise."""
        if len(text) <= _ANY_LENGTH:
            return
        limit = max(_ANY_LENGTH, self._info.max_model_len * tokenizer.longest_token)
        if len(text) > limit:
            fix = f"has {len(text)} characters: at most {limit} can be tokens of one prompt here"
            raise RequestError("prompt", text[:100], fix)

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise RequestError("sampling_params", params, "must be SamplingParams")
        limit = self._info.vocab_size
        for name in ("logit_bias", "allowed_token_ids"):
            for token_id in getattr(params, name) or ():
                if token_id >= limit:
                    raise RequestError(name, token_id, f"token ids must be in [0, {limit})")
