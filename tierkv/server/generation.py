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
from tierkv.server.context import AppSettings
from tierkv.server.errors import describe_error
from tierkv.server.protocol import ChatBody, CompletionBody, GenerationBody
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
from tierkv.server.tools_plan import plan_tools
from tierkv.server.tools_prompt import prompt_with_tools, template_text, with_known_roles
from tierkv.server.tools_reply import ToolTurn, whole_message
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
        self._search = body.beam_search()
        self.prompts = body.prompts()
        self.num_sequences = len(self.prompts) * self.params.n
        self.is_score_only = body.is_score_only
        self._echoes: dict[int, str] = {}
        self._logprobs: dict[int, LegacyLogprobs] = {}

    def start(self) -> list[Outputs]:
        """The outputs, as deltas, of each prompt."""
        return [
            self._engine.generate(
                self._prompt(prompt),
                self.params,
                f"{self.header.reply_id}-{number}",
                priority=self._body.priority,
                cache_salt=self._body.cache_salt or "",
                kv_hints=self._body.hints(),
                delta=True,
                beam_search=self._search,
            )
            for number, prompt in enumerate(self.prompts)
        ]

    def _prompt(self, prompt: str | list[int]) -> dict[str, Any]:
        if isinstance(prompt, str):
            adds = self._body.add_special_tokens is not False
            return {"prompt": prompt, "add_special_tokens": adds}
        return {"prompt_token_ids": prompt}

    async def body(self) -> Json:
        """The whole reply at once."""
        outputs = [self._without_sample(output) for output in await collect(self.start())]
        usage = Usage.of(outputs).body()
        if self._body.is_best_of:
            for output in outputs:
                keep_best(output, self._body.num_choices)
        choices = [
            choice
            for number, output in enumerate(outputs)
            for choice in self._choices(number, output)
        ]
        return {**self.header.body(), "choices": choices, "usage": usage}

    def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events."""
        return stream_events(self, self._body)

    def error_event(self, error: Exception) -> bytes:
        """The last event of a stream that `error` ends."""
        return sse.event(describe_error(error)[1])

    def first_choices(self) -> list[Json]:
        """Choices of a stream's opening chunks: none."""
        return []

    def reply_fields(self, output: RequestOutput) -> Json:
        """Fields beside the choices of a whole reply and of a stream's first chunk: none."""
        return {}

    def chunk_choices(self, number: int, delta: RequestOutput) -> list[Json]:
        """Choices of the chunk for one delta of prompt `number`."""
        delta = self._without_sample(delta)
        delta.outputs = [
            sample
            for sample in delta.outputs
            if self._body.shows(sample) or self._index(number, sample) not in self._echoes
        ]
        return self._choices(number, delta)

    def _index(self, number: int, sample: CompletionOutput) -> int:
        return number * self._body.num_choices + sample.index

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
        if self._body.return_token_ids:
            choice["token_ids"] = sample.token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids if is_first else None
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
        as_ids = bool(self._body.return_tokens_as_token_ids)
        state = self._logprobs.setdefault(index, LegacyLogprobs(self._body.logprobs, as_ids))
        return state.body(token_ids, positions, self._engine.tokenizer)


class ChatReply:
    """The reply to `/v1/chat/completions`.

    Raises:
        RequestError: a message has no text, or a parameter is wrong.
    """

    chunk_kind = "chat.completion.chunk"

    def __init__(self, engine: AsyncLLM, body: ChatBody, model: str, settings: AppSettings) -> None:
        self._engine, self._body, self._template = engine, body, settings.chat_template
        self.header = Header(f"chatcmpl-{uuid.uuid4().hex}", "chat.completion", model)
        self._plan = plan_tools(
            body.tools or [],
            body.tool_choice,
            parser=settings.tool_parser,
            is_auto_enabled=settings.enable_auto_tool_choice,
            is_parallel=body.parallel_tool_calls is not False,
        )
        self._turns: dict[int, ToolTurn] = {}
        self.params = body.params()
        grammar = self._plan.grammar(body.form_of_answers)
        self.params.structured_outputs = grammar or self.params.structured_outputs
        self._search = body.beam_search()
        self._messages = body.template_input()
        self.num_sequences = self.params.n
        self.is_score_only = False
        self._num_top = (body.top_logprobs or 0) if body.logprobs else None

    def start(self) -> list[Outputs]:
        """The outputs, as deltas."""
        messages, options = self._template_input()
        outputs = self._engine.chat(
            messages,
            self.params,
            self.header.reply_id,
            priority=self._body.priority,
            cache_salt=self._body.cache_salt or "",
            kv_hints=self._body.hints(),
            delta=True,
            beam_search=self._search,
            **options,
        )
        return [outputs]

    async def prompt_token_ids(self) -> list[int]:
        """The prompt that `start` would send."""
        messages, options = self._template_input()
        return await self._engine.tokenize_chat(messages, **options)

    def _template_input(self) -> tuple[list[Json], dict[str, Any]]:
        """Messages and options for the chat template."""
        options: dict[str, Any] = dict(self._body.chat_template_kwargs or {})
        if self._body.continue_final_message:
            options["continue_final_message"] = True
        options["add_generation_prompt"] = self._body.add_generation_prompt
        options["chat_template"] = self._template
        template = template_text(self._engine.tokenizer, self._template)
        messages, tools = prompt_with_tools(
            with_known_roles(self._messages, template), self._plan, template
        )
        return messages, {**options, "tools": tools} if tools else options

    async def body(self) -> Json:
        """The whole reply at once."""
        outputs = await collect(self.start())
        choices = [self._whole_choice(sample) for sample in outputs[0].outputs]
        reply = {**self.header.body(), "choices": choices, "usage": Usage.of(outputs).body()}
        return {**reply, **self.reply_fields(outputs[0])}

    def reply_fields(self, output: RequestOutput) -> Json:
        """Fields beside the choices of a whole reply and of a stream's first chunk."""
        fields: Json = {}
        if self._body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = output.prompt_token_ids
        return fields

    def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events."""
        return stream_events(self, self._body)

    def error_event(self, error: Exception) -> bytes:
        """The last event of a stream that `error` ends."""
        return sse.event(describe_error(error)[1])

    def first_choices(self) -> list[Json]:
        """Each answer's stream opens with its role."""
        opening = {"role": "assistant", "content": self._echo}
        return [chat_delta(index, opening) for index in range(self.params.n)]

    def chunk_choices(self, number: int, delta: RequestOutput) -> list[Json]:
        """Choices of the chunk for one delta."""
        choices = (
            self._chunk_choice(sample) for sample in delta.outputs if self._body.shows(sample)
        )
        return [choice for choice in choices if choice is not None]

    def _chunk_choice(self, sample: CompletionOutput) -> Json | None:
        """None when what came is held back: it may become a call."""
        delta = self._delta(sample)
        has_more = sample.finished or sample.logprobs or self._body.return_token_ids
        if not delta and not has_more:
            return None
        rest = {**self._ending(sample), **self._ids_of(sample)}
        return chat_delta(sample.index, delta, self._logprobs_of(sample), **rest)

    def _whole_choice(self, sample: CompletionOutput) -> Json:
        message = whole_message(self._delta(sample))
        if self._echo:
            message["content"] = self._echo + (message["content"] or "")
        logprobs = self._logprobs_of(sample)
        rest = {**self._ending(sample), **self._ids_of(sample)}
        return chat_choice(sample.index, message, logprobs, **rest)

    def _delta(self, sample: CompletionOutput) -> Json:
        """The news of a sample, read for calls where there may be some."""
        turn = self._turns.get(sample.index)
        if turn is None:
            parser = self._plan.make_parser()
            if parser is None:
                is_empty = sample.finished and not sample.text
                return {} if is_empty else {"content": sample.text}
            turn = ToolTurn(parser, is_parallel=self._plan.is_parallel)
            self._turns[sample.index] = turn
        return turn.read(sample.text, is_over=sample.finished)

    def _ending(self, sample: CompletionOutput) -> Json:
        turn = self._turns.get(sample.index)
        has_calls = turn is not None and turn.num_calls > 0
        reason = self._plan.finish_reason(sample.finish_reason, has_calls=has_calls)
        return {**ending(sample), "finish_reason": reason}

    def _logprobs_of(self, sample: CompletionOutput) -> Json | None:
        if self._num_top is None or sample.logprobs is None:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return chat_logprobs(sample.token_ids, sample.logprobs, self._num_top, as_ids=as_ids)

    def _ids_of(self, sample: CompletionOutput) -> Json:
        return {"token_ids": sample.token_ids} if self._body.return_token_ids else {}

    @property
    def _echo(self) -> str:
        """The message that is continued, if it shall be repeated."""
        last = self._messages[-1]
        return last["content"] if self._body.echo and last["role"] == "assistant" else ""


OpenAIReply = CompletionReply | ChatReply


def keep_best(output: RequestOutput, count: int) -> None:
    """Keep the samples whose tokens have the highest mean log-probability, best first."""

    def mean(sample: CompletionOutput) -> float:
        return (sample.cumulative_logprob or 0.0) / max(1, len(sample.token_ids))

    output.outputs = sorted(output.outputs, key=mean, reverse=True)[:count]
    for index, sample in enumerate(output.outputs):
        sample.index = index


class RunningUsage:
    """Token counts of a stream so far."""

    def __init__(self, *, counts_samples: bool) -> None:
        self._counts_samples, self._num_generated = counts_samples, 0
        self._last: dict[int, RequestOutput] = {}

    @property
    def is_empty(self) -> bool:
        return not self._last

    def add(self, number: int, delta: RequestOutput) -> None:
        """Count one delta of prompt `number`, before what is not shown is taken out of it."""
        self._last[number] = delta
        if self._counts_samples:
            self._num_generated += sum(len(sample.token_ids) for sample in delta.outputs)

    def body(self) -> Json:
        usage = Usage.of(self._last.values())
        usage.completion_tokens = self._num_generated
        return usage.body()


async def stream_events(reply: OpenAIReply, options: GenerationBody) -> AsyncGenerator[bytes, None]:
    """The reply as server-sent events, up to and including `[DONE]`.

    The first event comes with the first output, so what the engine refuses is raised before it.
    """
    chunks = stream_chunks(
        reply, wants_usage=options.wants_usage_chunk, in_all=options.wants_usage_in_chunks
    )
    async with aclosing(chunks):
        async for chunk in chunks:
            yield sse.event(chunk)
    yield sse.DONE


async def stream_chunks(
    reply: OpenAIReply, *, wants_usage: bool, in_all: bool
) -> AsyncGenerator[Json, None]:
    """The reply's chunks; the token counts come in a last one, and with `in_all` in all of them."""
    usage = RunningUsage(counts_samples=not reply.is_score_only)
    head = reply.header.body(reply.chunk_kind)
    if wants_usage:
        head["usage"] = None
    async with aclosing(merge(reply.start())) as outputs:
        async for number, delta in outputs:
            is_first = usage.is_empty
            usage.add(number, delta)
            if in_all:
                head["usage"] = usage.body()
            choices = reply.first_choices() if is_first else []
            once = reply.reply_fields(delta) if is_first else {}
            for choice in choices + reply.chunk_choices(number, delta):
                yield {**head, **once, "choices": [choice]}
                once = {}
    if wants_usage:
        yield {**head, "choices": [], "usage": usage.body()}
