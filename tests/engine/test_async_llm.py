"""`AsyncLLM`: the same answers from another process; cancelling, aborting, crashing."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import os
import signal
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from text_models import VOCAB_SIZE

from tierkv import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    CompletionOutput,
    RequestOutput,
    SamplingParams,
)
from tierkv.errors import ConfigError, EngineDeadError, RequestError
from tierkv.types import PositionLogprobs

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 8,
    "num_gpu_blocks": 64,
    "max_model_len": 256,
    "num_threads": 1,
    "verify_model": False,
}
TEXT = "the code of the fox"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM.from_options(str(text_model), **OPTIONS)
    yield engine
    engine.shutdown()


async def idle(llm: AsyncLLM) -> dict[str, Any]:
    """Metrics once nothing runs; fails when something goes on for ten seconds."""
    for _ in range(500):
        metrics = await llm.metrics()
        if metrics["running"] == metrics["waiting"] == metrics["gpu_blocks_used"] == 0:
            return metrics
        await asyncio.sleep(0.02)
    raise AssertionError(metrics)


def run(llm: AsyncLLM, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in an event loop of its own; afterwards nothing is left in either process."""

    async def guarded() -> None:
        await asyncio.wait_for(test(), 60)
        await idle(llm)
        await llm.check_health(timeout_s=30)

    asyncio.run(guarded())
    assert not llm._waiters and not llm._engine_ids and len(llm._outputs) == 0


async def last(outputs: Any) -> RequestOutput:
    found = [output async for output in outputs]
    assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]
    final: RequestOutput = found[-1]
    return final


def without_logprobs(output: CompletionOutput) -> CompletionOutput:
    return dataclasses.replace(output, logprobs=None, cumulative_logprob=None)


def check_close(
    mine: Sequence[PositionLogprobs | None] | None, other: Sequence[PositionLogprobs | None] | None
) -> None:
    """The same tokens and ranks; values to rounding, which the steps' make-up decides."""
    assert (mine is None) == (other is None)
    for ours, theirs in zip(mine or [], other or [], strict=True):
        assert (ours or {}).keys() == (theirs or {}).keys()
        for token, logprob in (ours or {}).items():
            twin = (theirs or {})[token]
            assert (logprob.rank, logprob.decoded_token) == (twin.rank, twin.decoded_token)
            assert logprob.logprob == pytest.approx(twin.logprob, abs=1e-4)


def test_answers_equal_those_of_llm(llm: AsyncLLM, text_model: Path) -> None:
    """Many at once, with stop strings, samples and log-probabilities."""
    prompts: list[Any] = [TEXT, "seven", [5, 6, 7], {"prompt": "the house", "cache_salt": "s"}]
    params = [
        GREEDY,
        SamplingParams(n=3, seed=4, max_tokens=9, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=30, min_tokens=2, stop=["e", "i"]),
        SamplingParams(seed=9, top_p=0.9, max_tokens=20, logit_bias={40: 2.0}),
    ]
    with LLM(str(text_model), **OPTIONS) as local:
        expected = local.generate(prompts, params, use_tqdm=False)
        assert local.info == llm.info

    async def test() -> None:
        streams = [llm.generate(p, s) for p, s in zip(prompts, params, strict=True)]
        found = await asyncio.gather(*map(last, streams))
        for ours, theirs in zip(found, expected, strict=True):
            assert [without_logprobs(o) for o in ours.outputs] == [
                without_logprobs(o) for o in theirs.outputs
            ]
            for mine, other in zip(ours.outputs, theirs.outputs, strict=True):
                check_close(mine.logprobs, other.logprobs)
            check_close(ours.prompt_logprobs, theirs.prompt_logprobs)
            assert (ours.prompt, ours.prompt_token_ids) == (theirs.prompt, theirs.prompt_token_ids)

    run(llm, test)


def test_outputs_grow_and_deltas_add_up(llm: AsyncLLM) -> None:
    async def test() -> None:
        texts = [o.outputs[0].text async for o in llm.generate(TEXT, GREEDY)]
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        deltas = [o async for o in llm.generate(TEXT, GREEDY, delta=True)]
        pieces = [c for o in deltas for c in o.outputs]
        assert "".join(c.text for c in pieces) == texts[-1]
        assert sum(len(c.token_ids) for c in pieces) == 12
        assert len(deltas) > 1

    run(llm, test)


def test_a_slow_reader_gets_everything_in_fewer_pieces(llm: AsyncLLM) -> None:
    async def test() -> None:
        slow = llm.generate(TEXT, LONG, delta=True)
        parts = [await anext(slow)]
        await last(llm.generate(TEXT, LONG))  # meanwhile the slow one finishes too
        await idle(llm)
        parts.extend([o async for o in slow])
        assert len(parts) <= 3
        assert sum(len(c.token_ids) for o in parts for c in o.outputs) == 200

    run(llm, test)


def test_chat(llm: AsyncLLM) -> None:
    async def test() -> None:
        messages = [{"role": "user", "content": "hi"}]
        output = await last(llm.chat(messages, GREEDY, "chat-1"))
        assert output.prompt == "<|user|>hi\n<|assistant|>"
        assert output.request_id == "chat-1"
        with pytest.raises(RequestError, match="messages"):
            llm.chat([{"content": "no role"}])

    run(llm, test)


# -- ending early --------------------------------------------------------------------------------


def test_closing_the_iterator_aborts_the_request(llm: AsyncLLM) -> None:
    async def test() -> None:
        before = await llm.metrics()
        outputs = llm.generate(TEXT, LONG, "left")
        assert not (await anext(outputs)).finished
        await outputs.aclose()
        after = await idle(llm)
        assert after["finished_abort"] == before["finished_abort"] + 1
        assert after["generated_tokens"] < before["generated_tokens"] + 200
        # The id is free again at once, and the aborted one's last output does not reach it.
        first = llm.generate(TEXT, LONG, "left")
        await anext(first)
        await first.aclose()
        output = await last(llm.generate(TEXT, GREEDY, "left"))
        assert output.outputs[0].finish_reason == "length"

    run(llm, test)


def test_cancelling_the_task_aborts_the_request(llm: AsyncLLM) -> None:
    async def test() -> None:
        before = await llm.metrics()
        tasks = [asyncio.create_task(last(llm.generate(TEXT, LONG))) for _ in range(5)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(f, asyncio.CancelledError) for f in found)
        after = await idle(llm)
        assert after["finished_length"] == before["finished_length"]

    run(llm, test)


def test_abort_by_id_delivers_a_last_output(llm: AsyncLLM) -> None:
    async def test() -> None:
        outputs = llm.generate(TEXT, SamplingParams(n=2, max_tokens=200, ignore_eos=True), "a")
        await anext(outputs)
        await llm.abort(["a", "never seen"])
        final = await last(outputs)
        assert [c.finish_reason for c in final.outputs] == ["abort"] * 2

    run(llm, test)


def test_random_aborts_leave_no_block(llm: AsyncLLM) -> None:
    async def leave_after(count: int) -> None:
        outputs = llm.generate(TEXT * (1 + count % 3), SamplingParams(n=1 + count % 2))
        for _ in range(count % 7):
            if (await anext(outputs, None)) is None:
                break
        await outputs.aclose()

    async def test() -> None:
        await asyncio.gather(*(leave_after(i) for i in range(40)))

    run(llm, test)


# -- errors --------------------------------------------------------------------------------------


def test_refusals_keep_their_type_and_the_engine_goes_on(llm: AsyncLLM) -> None:
    """Those of the front end and those that only the engine can know."""

    async def refused(prompt: Any, params: SamplingParams | None = None, **options: Any) -> Any:
        with pytest.raises(RequestError) as caught:
            await last(llm.generate(prompt, params, **options))
        return caught.value

    async def test() -> None:
        good = asyncio.create_task(last(llm.generate(TEXT, LONG, "busy")))
        await asyncio.sleep(0)
        assert (await refused("")).field == "prompt"
        assert (await refused([VOCAB_SIZE])).field == "prompt_token_ids"
        assert "max_model_len=256" in str(await refused([5] * 300))
        assert (await refused({"texts": 1})).field == "texts"
        assert (await refused("\ud800")).field == "prompt"
        assert (await refused("a", priority=2**70)).field == "priority"
        assert (await refused("a", SamplingParams(logit_bias={900: 1.0}))).field == "logit_bias"
        assert (await refused("a", request_id="busy")).field == "request_id"
        assert (await refused([2**70])).field == "request"
        assert (await refused("a", SamplingParams(n=1000))).field == "n"
        assert len((await good).outputs[0].token_ids) == 200

    run(llm, test)


def test_a_search_gives_as_many_results_as_it_has_beams(llm: AsyncLLM) -> None:
    search = BeamSearchParams(beam_width=3, max_tokens=4)

    async def test() -> None:
        beside = asyncio.ensure_future(last(llm.generate(TEXT, LONG)))
        for n in (1, 4):
            with pytest.raises(RequestError, match=rf"n={n}: .* 3"):
                await last(llm.generate(TEXT, SamplingParams(n=n), beam_search=search))
        found = await last(llm.generate(TEXT, SamplingParams(n=3), beam_search=search))
        assert len({tuple(sample.token_ids) for sample in found.outputs}) == 3
        assert (await beside).outputs[0].finish_reason == "length"

    run(llm, test)


def test_long_texts_are_tokenised_beside_the_event_loop(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    encode, threads = tokenizer.encode, list[bool]()

    def recorded(text: str, **options: Any) -> list[int]:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", recorded)

    async def test() -> None:
        await last(llm.generate(TEXT, GREEDY))
        with pytest.raises(RequestError, match="max_model_len"):
            await last(llm.generate(TEXT * 1000))
        assert threads == [True, False]

    run(llm, test)


def test_caches_metrics_and_several_event_loops(llm: AsyncLLM) -> None:
    """Each `asyncio.run` has a loop of its own."""

    async def cached_tokens() -> int:
        output = await last(llm.generate(TEXT * 8, GREEDY))
        await idle(llm)
        return output.num_cached_tokens or 0

    async def reset() -> None:
        assert await llm.reset_prefix_cache()

    asyncio.run(reset())
    assert asyncio.run(cached_tokens()) == 0
    assert asyncio.run(cached_tokens()) > 20
    asyncio.run(reset())
    assert asyncio.run(cached_tokens()) == 0


def test_an_idle_engine_does_not_spin(llm: AsyncLLM) -> None:
    async def test() -> None:
        await last(llm.generate(TEXT, GREEDY))
        await idle(llm)

    run(llm, test)
    stat = Path(f"/proc/{llm._client.process.pid}/stat")

    def cpu_ticks() -> int:
        fields = stat.read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(0.1)
    before = cpu_ticks()
    time.sleep(0.5)
    assert cpu_ticks() - before <= 5  # of 50


# -- death ---------------------------------------------------------------------------------------


def test_a_killed_engine_wakes_every_waiter(text_model: Path) -> None:
    llm = AsyncLLM.from_options(str(text_model), **OPTIONS)

    async def test() -> None:
        tasks = [asyncio.create_task(last(llm.generate(TEXT, LONG))) for _ in range(4)]
        await anext(llm.generate(TEXT, LONG))
        os.kill(llm._client.process.pid, signal.SIGSTOP)  # a call is then certainly on its way
        tasks.append(asyncio.create_task(llm.metrics()))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        os.kill(llm._client.process.pid, signal.SIGKILL)
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert [type(f) for f in found] == [EngineDeadError] * 5
        assert "SIGKILL" in str(found[0])
        assert llm.is_dead
        for call in (llm.metrics(), llm.check_health(), last(llm.generate("a"))):
            with pytest.raises(EngineDeadError):
                await call
        await llm.abort("whatever")  # harmless

    asyncio.run(test())
    assert not llm._waiters
    llm.shutdown()
    llm.shutdown()


@pytest.mark.full
def test_a_crash_in_the_engine_carries_its_last_words(
    text_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A message that the engine does not know is a bug, and bugs are loud."""
    llm = AsyncLLM.from_options(str(text_model), **OPTIONS)

    async def test() -> None:
        task = asyncio.create_task(last(llm.generate(TEXT, LONG)))
        await asyncio.sleep(0.05)
        llm._client.send("call", 1, "no such call")
        with pytest.raises(EngineDeadError, match=r"status 1.*KeyError: 'no such call'"):
            await task

    asyncio.run(test())
    llm.shutdown()
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.full
def test_an_engine_nobody_refers_to_is_shut_down(text_model: Path) -> None:
    llm = AsyncLLM.from_options(str(text_model), **OPTIONS)
    process, directory = llm._client.process, llm._client._directory
    del llm
    gc.collect()
    assert process.returncode is not None and not directory.exists()


@pytest.mark.full
def test_a_bad_tokenizer_ends_the_engine_again(text_model: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        AsyncLLM.from_options(str(text_model), tokenizer="no/such/directory", **OPTIONS)


def test_unknown_options_start_nothing(text_model: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean num_gpu_blocks"):
        AsyncLLM.from_options(str(text_model), num_gpu_block=3)


def test_sockets_are_private_and_shutdown_wakes_waiters(llm: AsyncLLM) -> None:
    """The last test of this file: it ends the engine that the others share."""
    process, directory = llm._client.process, llm._client._directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    sockets = list(directory.iterdir())
    assert len(sockets) == 2
    assert all(stat.S_IMODE(s.stat().st_mode) == 0o600 and s.is_socket() for s in sockets)

    async def test() -> None:
        task = asyncio.create_task(last(llm.generate(TEXT, LONG)))
        await anext(llm.generate(TEXT, LONG))
        await asyncio.to_thread(llm.shutdown)
        with pytest.raises(EngineDeadError, match="shut down"):
            await task
        with pytest.raises(EngineDeadError, match="shut down"):
            await llm.metrics()

    asyncio.run(test())
    assert process.returncode == 0 and not directory.exists()
    llm.shutdown()
