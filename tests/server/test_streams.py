"""Merging, collecting and abandoning the outputs of several requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tierkv.engine.outputs import CompletionOutput, RequestOutput
from tierkv.errors import RequestError
from tierkv.server.streams import collect, merge


def delta(text: str, *, index: int = 0, is_last: bool = False) -> RequestOutput:
    sample = CompletionOutput(index, text, [len(text)], finish_reason="stop" if is_last else None)
    return RequestOutput("r", "p", [1], [sample], finished=is_last)


class Source:
    """Gives words one by one and remembers whether it was closed."""

    def __init__(self, words: list[str], error: Exception | None = None) -> None:
        self.words, self.error, self.is_closed = words, error, False

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        try:
            for word in self.words:
                await asyncio.sleep(0)
                yield delta(word, is_last=self.error is None and word is self.words[-1])
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


def test_merged_sources_keep_their_own_order() -> None:
    async def read() -> dict[int, list[str]]:
        found: dict[int, list[str]] = {0: [], 1: [], 2: []}
        sources = [Source(["a", "b"]), Source(["c"]), Source(["d", "e", "f"])]
        async for number, output in merge([source.outputs() for source in sources]):
            found[number].append(output.outputs[0].text)
        assert all(source.is_closed for source in sources)
        return found

    assert asyncio.run(read()) == {0: ["a", "b"], 1: ["c"], 2: ["d", "e", "f"]}


def test_an_error_of_one_source_closes_all() -> None:
    async def read() -> None:
        endless = Source(["x"] * 10_000)
        bad = Source(["y"], RequestError("prompt", "y", "is bad"))
        with pytest.raises(RequestError, match="is bad"):
            async for _ in merge([endless.outputs(), bad.outputs()]):
                pass
        assert endless.is_closed and bad.is_closed

    asyncio.run(read())


def test_closing_the_merge_closes_all_sources() -> None:
    async def read() -> None:
        sources = [Source(["x"] * 100), Source(["y"] * 100), Source([*"zzz"])]
        merged = merge([source.outputs() for source in sources])
        await anext(merged)
        await merged.aclose()
        assert all(source.is_closed for source in sources)

    asyncio.run(read())


def test_cancelling_the_reader_closes_all_sources() -> None:
    async def read() -> None:
        never = asyncio.Event()
        started = asyncio.Event()
        closed = []

        async def stuck() -> AsyncIterator[RequestOutput]:
            started.set()
            try:
                await never.wait()
                yield delta("never")
            finally:
                closed.append(True)

        task = asyncio.create_task(collect([stuck(), stuck()]))
        await started.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [True, True]

    asyncio.run(read())


def test_deltas_are_put_together_per_sample() -> None:
    async def news() -> AsyncIterator[RequestOutput]:
        yield delta("he", index=1)
        yield delta("wor", index=0)
        yield delta("llo", index=1, is_last=True)
        yield delta("ld", index=0, is_last=True)

    (whole,) = asyncio.run(collect([news()]))
    assert [(sample.index, sample.text) for sample in whole.outputs] == [(0, "world"), (1, "hello")]
    assert [sample.token_ids for sample in whole.outputs] == [[3, 2], [2, 3]]
    assert all(sample.finish_reason == "stop" for sample in whole.outputs)
