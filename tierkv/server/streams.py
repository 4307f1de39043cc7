"""Consuming the engine's outputs: several at once, to the end, or until the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request

from tierkv.engine.outputs import CompletionOutput, RequestOutput

T = TypeVar("T")
Outputs = AsyncIterator[RequestOutput]
_Queue = asyncio.Queue[tuple[int, RequestOutput | Exception | None]]


class ClientGone(Exception):
    """The client closed its connection before the reply was complete."""


async def until_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled when the client disconnects first.

    Raises:
        ClientGone: the client disconnected.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, leaving):
            pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def merge(sources: Sequence[Outputs]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of all sources as they come, each with the number of its source.

    The first error of a source is raised here; when this is closed, so are all sources.
    """
    queue: _Queue = asyncio.Queue(len(sources))
    tasks = [asyncio.create_task(_pump(i, source, queue)) for i, source in enumerate(sources)]
    num_open = len(sources)
    try:
        while num_open:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield number, item
    finally:
        await _cancel(tasks)


async def _pump(number: int, source: Outputs, queue: _Queue) -> None:
    try:
        async with aclosing(source) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                await queue.put((number, output))
    except Exception as error:  # whatever it is, the reader raises it
        await queue.put((number, error))
    else:
        await queue.put((number, None))


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def collect(sources: Sequence[Outputs]) -> list[RequestOutput]:
    """The complete output of each source, put together from its deltas."""
    whole: dict[int, RequestOutput] = {}
    async with aclosing(merge(sources)) as outputs:
        async for number, delta in outputs:
            whole[number] = extend(whole[number], delta) if number in whole else delta
    return [whole[number] for number in range(len(sources))]


def extend(whole: RequestOutput, delta: RequestOutput) -> RequestOutput:
    """`whole` with a delta added; a sample may appear with any delta."""
    samples = {sample.index: sample for sample in whole.outputs}
    for news in delta.outputs:
        if news.index in samples:
            _extend_sample(samples[news.index], news)
        else:
            samples[news.index] = news
    delta.outputs = [samples[index] for index in sorted(samples)]
    return delta


def _extend_sample(sample: CompletionOutput, news: CompletionOutput) -> None:
    sample.text += news.text
    sample.token_ids += news.token_ids
    if sample.logprobs is not None and news.logprobs is not None:
        sample.logprobs += news.logprobs
    sample.cumulative_logprob = news.cumulative_logprob
    sample.finish_reason, sample.stop_reason = news.finish_reason, news.stop_reason
