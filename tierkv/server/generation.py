"""One reply: from a checked body to the engine's requests, and back to choices or chunks.

`CompletionReply` and `ChatReply` differ in how a request begins and how a choice looks.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tierkv.engine.async_llm import AsyncLLM
from tierkv.engine.outputs import CompletionOutput, RequestOutput
from tierkv.errors import RequestError
from tierkv.server import sse
from tierkv.server.protocol import ChatBody, CompletionBody
from tierkv.server.replies import (
    Header,
    Json,
    LegacyLogprobs,
    Usage,
    chat_choice,
    chat_delta,
    chat_logprobs,
    ending,
    prompt_logprobs_body,
)
from tierkv.server.streams import Outputs, collect, merge
from tierkv.types import PositionLogprobs


class CompletionReply:
    """The reply to `/v1/completions`. Choice `p * n + i` is sample i of prompt p.

    Raises:
        RequestError: the prompt has none of the forms allowed, or a parameter is wrong.
    """

    chunk_kind = "text_completion"

    def __init__(self, engine: AsyncLLM, body: CompletionBody, model: str) -> None:
        self._engine, self._body = engine, body
        self.header = Header(f"cmpl-{uuid.uuid4().hex}", "text_completion", model)
        self.params = body.params()
        self.prompts = body.prompts()
        self.num_sequences = len(self.prompts) * self.params.n
        self.is_score_only = body.is_score_only
        self._echoes: dict[int, str] = {}
        self._logprobs: dict[int, LegacyLogprobs] = {}

    def start(self) -> list[Outputs]:
        """The outputs, as deltas, of each prompt."""
        return [
            self._engine.generate(
                {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt},
                self.params,
                f"{self.header.reply_id}-{number}",
                priority=self._body.priority,
                cache_salt=self._body.cache_salt or "",
                delta=True,
            )
            for number, prompt in enumerate(self.prompts)
        ]

    async def body(self) -> Json:
        """The whole reply at once."""
        outputs = [self._without_sample(output) for output in await collect(self.start())]
        choices = [
            choice
            for number, output in enumerate(outputs)
            for choice in self._choices(number, output)
        ]
        return {**self.header.body(), "choices": choices, "usage": Usage.of(outputs).body()}

    def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events."""
        return stream_events(self, wants_usage=self._body.wants_usage_chunk)

    def first_choices(self) -> list[Json]:
        """Choices of a stream's opening chunks: none."""
        return []

    def chunk_choices(self, number: int, delta: RequestOutput) -> list[Json]:
        """Choices of the chunk for one delta of prompt `number`."""
        delta = self._without_sample(delta)
        delta.outputs = [
            sample
            for sample in delta.outputs
            if has_news(sample) or self._index(number, sample) not in self._echoes
        ]
        return self._choices(number, delta)

    def _index(self, number: int, sample: CompletionOutput) -> int:
        return number * self.params.n + sample.index

    def _without_sample(self, output: RequestOutput) -> RequestOutput:
        """Drop the token that was only generated so that the prompt was computed."""
        if self.is_score_only:
            for sample in output.outputs:
                sample.text, sample.token_ids, sample.logprobs = "", [], []
                sample.finish_reason = "length" if sample.finished else None
        return output

    def _choices(self, number: int, output: RequestOutput) -> list[Json]:
        return [self._choice(number, sample, output) for sample in output.outputs]

    def _choice(self, number: int, sample: CompletionOutput, output: RequestOutput) -> Json:
        index = self._index(number, sample)
        is_first = index not in self._echoes
        if is_first:
            self._echoes[index] = self._echo(output) if self._body.echo else ""
        choice = {
            "index": index,
            "text": (self._echoes[index] if is_first else "") + sample.text,
            "logprobs": self._logprobs_of(index, sample, output, is_first),
            **ending(sample),
        }
        if self._body.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        return choice

    def _echo(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise RequestError("echo", True, "needs a tokenizer, and this model has none")
        return tokenizer.decode(output.prompt_token_ids)

    def _logprobs_of(
        self, index: int, sample: CompletionOutput, output: RequestOutput, is_first: bool
    ) -> Json | None:
        if self._body.logprobs is None or sample.logprobs is None:
            return None
        token_ids = list(sample.token_ids)
        positions: list[PositionLogprobs | None] = list(sample.logprobs)
        if self._body.echo and is_first and output.prompt_logprobs is not None:
            token_ids = output.prompt_token_ids + token_ids
            positions = output.prompt_logprobs + positions
        state = self._logprobs.setdefault(index, LegacyLogprobs(self._body.logprobs))
        return state.body(token_ids, positions, self._engine.tokenizer)


class ChatReply:
    """The reply to `/v1/chat/completions`.

    Raises:
        RequestError: a message has no text, or a parameter is wrong.
    """

    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, engine: AsyncLLM, body: ChatBody, model: str, chat_template: str | None
    ) -> None:
        self._engine, self._body, self._template = engine, body, chat_template
        self.header = Header(f"chatcmpl-{uuid.uuid4().hex}", "chat.completion", model)
        self.params = body.params()
        self._messages = body.template_input()
        self.num_sequences = self.params.n
        self.is_score_only = False
        self._num_top = (body.top_logprobs or 0) if body.logprobs else None

    def start(self) -> list[Outputs]:
        """The outputs, as deltas."""
        options: dict[str, Any] = self._body.chat_template_kwargs or {}
        outputs = self._engine.chat(
            self._messages,
            self.params,
            self.header.reply_id,
            priority=self._body.priority,
            cache_salt=self._body.cache_salt or "",
            delta=True,
            add_generation_prompt=self._body.add_generation_prompt,
            chat_template=self._template,
            **options,
        )
        return [outputs]

    async def body(self) -> Json:
        """The whole reply at once."""
        outputs = await collect(self.start())
        choices = [chat_choice(sample, self._num_top) for sample in outputs[0].outputs]
        reply = {**self.header.body(), "choices": choices, "usage": Usage.of(outputs).body()}
        if self._body.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_logprobs_body(outputs[0].prompt_logprobs)
        return reply

    def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events."""
        return stream_events(self, wants_usage=self._body.wants_usage_chunk)

    def first_choices(self) -> list[Json]:
        """Each answer's stream opens with its role."""
        opening = {"role": "assistant", "content": ""}
        return [chat_delta(index, opening) for index in range(self.params.n)]

    def chunk_choices(self, number: int, delta: RequestOutput) -> list[Json]:
        """Choices of the chunk for one delta."""
        return [self._chunk_choice(sample) for sample in delta.outputs if has_news(sample)]

    def _chunk_choice(self, sample: CompletionOutput) -> Json:
        logprobs = None
        if self._num_top is not None and sample.logprobs is not None:
            logprobs = chat_logprobs(sample.token_ids, sample.logprobs, self._num_top)
        content = {"content": sample.text} if sample.text or not sample.finished else {}
        return chat_delta(sample.index, content, logprobs, **ending(sample))


OpenAIReply = CompletionReply | ChatReply


def has_news(sample: CompletionOutput) -> bool:
    """Whether a delta shows: tokens may be held back until they are whole characters."""
    return bool(sample.text or sample.logprobs or sample.finished)


async def stream_events(reply: OpenAIReply, *, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    """The reply as server-sent events, up to and including `[DONE]`.

    The first event comes with the first output, so what the engine refuses is raised before it.
    """
    last: dict[int, RequestOutput] = {}
    usage = Usage()
    head = reply.header.body(reply.chunk_kind)
    if wants_usage:
        head["usage"] = None
    async with aclosing(merge(reply.start())) as outputs:
        async for number, delta in outputs:
            if not last:
                for choice in reply.first_choices():
                    yield sse.event({**head, "choices": [choice]})
            last[number] = delta
            # Before the choices leave out the samples whose text is held back.
            num_tokens = sum(len(sample.token_ids) for sample in delta.outputs)
            usage.completion_tokens += 0 if reply.is_score_only else num_tokens
            for choice in reply.chunk_choices(number, delta):
                yield sse.event({**head, "choices": [choice]})
    if wants_usage:
        prompts = Usage.of(last.values())
        usage.prompt_tokens, usage.cached_tokens = prompts.prompt_tokens, prompts.cached_tokens
        yield sse.event({**head, "choices": [], "usage": usage.body()})
    yield sse.DONE
