"""What users give, checked and brought into one form: prompts, conversations, parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tierkv.engine.core import EngineInfo, EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import RequestError

Prompt = str | list[int] | Mapping[str, Any]
"""Text, token ids, or `{"prompt": str}` / `{"prompt_token_ids": [...]}`, each with an optional
`"cache_salt"`."""

_PROMPT_FORMS = 'a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}'
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


@dataclass(slots=True)
class ParsedPrompt:
    """A prompt as text, as token ids, or both (the ids are then the text's)."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str = ""
    add_special_tokens: bool = True


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
    return ParsedPrompt(text, None if ids is None else _token_ids(ids), salt)


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
        _check_unicode("prompt", prompt.text)
        tokenizer = self.require_tokenizer("prompt", prompt.text)
        return tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)

    def request(
        self, request_id: str, prompt: ParsedPrompt, params: SamplingParams, priority: int = 0
    ) -> EngineRequest:
        """Tokenise and check one request."""
        self._check_params(params)
        _check_unicode("request_id", request_id)
        _check_unicode("cache_salt", prompt.cache_salt)
        is_integer = isinstance(priority, int) and not isinstance(priority, bool)
        if not is_integer or not -(2**63) <= priority < 2**63:
            raise RequestError("priority", priority, "must be an integer of 64 bits")
        token_ids = self.tokenize(prompt)
        return EngineRequest(request_id, token_ids, params, priority, prompt.cache_salt)

    def chat_prompt(self, messages: list[dict[str, Any]], **options: Any) -> ParsedPrompt:
        """The prompt of a conversation; `options` are those of `Tokenizer.chat_text`."""
        tokenizer = self.require_tokenizer("messages", messages)
        text = tokenizer.chat_text(messages, **options)
        return ParsedPrompt(text, None, add_special_tokens=False)  # the template wrote them

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise RequestError("sampling_params", params, "must be SamplingParams")
        limit = self._info.vocab_size
        for token_id in params.logit_bias or ():
            if token_id >= limit:
                raise RequestError("logit_bias", token_id, f"token ids must be in [0, {limit})")
