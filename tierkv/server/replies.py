"""What clients get: OpenAI's response bodies and stream chunks, with vLLM's extra fields."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tierkv.engine.outputs import CompletionOutput, PromptSources, RequestOutput
from tierkv.engine.tokenizer import Tokenizer
from tierkv.types import Logprob, PositionLogprobs

Json = dict[str, Any]


@dataclass(slots=True)
class Header:
    """The fields at the head of every body and chunk of one reply."""

    reply_id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str | None = None) -> Json:
        """A new body; `kind` is its `object` if not the reply's own."""
        return {
            "id": self.reply_id,
            "object": kind or self.kind,
            "created": self.created,
            "model": self.model,
        }


@dataclass(slots=True)
class Usage:
    """Token counts over all prompts and samples of a reply."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    sources: PromptSources = field(default_factory=PromptSources)

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> Usage:
        usage = cls()
        for output in outputs:
            usage.prompt_tokens += len(output.prompt_token_ids)
            usage.completion_tokens += sum(len(sample.token_ids) for sample in output.outputs)
            usage.cached_tokens += output.num_cached_tokens or 0
            if output.prompt_sources is not None:
                usage.sources.add(output.prompt_sources)
        return usage

    def body(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "gpu_tokens": self.sources.gpu,
                "cpu_tokens": self.sources.cpu,
                "nvme_tokens": self.sources.nvme,
                "computed_tokens": self.prompt_tokens - self.cached_tokens,
            },
        }


# -- log-probabilities -----------------------------------------------------------------------------


def token_text(token_id: int, entry: Logprob, *, as_id: bool = False) -> str:
    """The token as text; models without a tokenizer show ids, as vLLM does."""
    text = None if as_id else entry.decoded_token
    return nameless(token_id) if text is None else text


def nameless(token_id: int) -> str:
    return f"token_id:{token_id}"


def best(position: PositionLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely candidates, best first (the chosen token only if among them)."""
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return [(token_id, entry) for token_id, entry in ranked if entry.rank <= count]


def chat_logprobs(
    token_ids: list[int], positions: list[PositionLogprobs], num_top: int, *, as_ids: bool = False
) -> Json:
    """Log-probabilities as chat completions show them."""

    def entry(token_id: int, found: Logprob) -> Json:
        text = token_text(token_id, found, as_id=as_ids)
        return {"token": text, "logprob": found.logprob, "bytes": list(text.encode())}

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = [entry(candidate, found) for candidate, found in best(position, num_top)]
        content.append({**entry(token_id, position[token_id]), "top_logprobs": top})
    return {"content": content}


@dataclass(slots=True)
class LegacyLogprobs:
    """Log-probabilities as `/v1/completions` shows them; offsets go on from chunk to chunk."""

    num_top: int
    as_ids: bool = False
    offset: int = 0

    def body(
        self,
        token_ids: list[int],
        positions: list[PositionLogprobs | None],
        tokenizer: Tokenizer | None,
    ) -> Json:
        """The lists for some consecutive tokens; a None position has no log-probabilities."""
        texts = []
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is not None:
                texts.append(token_text(token_id, position[token_id], as_id=self.as_ids))
            elif tokenizer is None or self.as_ids:
                texts.append(nameless(token_id))
            else:
                texts.append(tokenizer.token_text(token_id))
        chosen = list(zip(token_ids, positions, strict=True))
        return {
            "tokens": texts,
            "token_logprobs": [p and p[token_id].logprob for token_id, p in chosen],
            "top_logprobs": [p and self._top(token_id, p) for token_id, p in chosen],
            "text_offset": [self._advance(text) for text in texts],
        }

    def _advance(self, text: str) -> int:
        start = self.offset
        self.offset += len(text)
        return start

    def _top(self, token_id: int, position: PositionLogprobs) -> dict[str, float]:
        """The best candidates and the chosen token."""
        entries = dict(best(position, self.num_top)) | {token_id: position[token_id]}
        return {
            token_text(candidate, entry, as_id=self.as_ids): entry.logprob
            for candidate, entry in entries.items()
        }


def prompt_logprobs_body(
    positions: list[PositionLogprobs | None] | None,
) -> list[Json | None] | None:
    """vLLM's `prompt_logprobs`: per position, token id -> log-probability, rank and text."""
    if positions is None:
        return None
    return [None if position is None else _by_id(position) for position in positions]


def _by_id(position: PositionLogprobs) -> Json:
    return {
        str(token_id): {
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token_id, entry in position.items()
    }


# -- choices ---------------------------------------------------------------------------------------


def ending(sample: CompletionOutput) -> Json:
    """How a sample ended."""
    return {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}


def chat_choice(index: int, message: Json, logprobs: Json | None, **end: Any) -> Json:
    """One answer of a chat completion."""
    return {
        "index": index,
        "message": {"role": "assistant", **message},
        "logprobs": logprobs,
        **end,
    }


def chat_delta(index: int, delta: Json, logprobs: Json | None = None, **end: Any) -> Json:
    """One choice of a chat stream's chunk."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **end}


def error_body(message: str, kind: str, param: str | None, code: str | None) -> Json:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
