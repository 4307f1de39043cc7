"""Hints and sleep in the caller's process, with a real model and the bytes of its pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from tierkv import LLM, KvHints, RequestError, SamplingParams

PROMPT = "something that is said again and again, and is longer than four blocks of sixteen"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("offload", [None, "cpu=4MiB", "nvme=16MiB"])
def test_sleep_gives_the_pool_back_and_loses_no_token(
    servable: Path, tmp_path: Path, offload: str | None
) -> None:
    options = {"num_gpu_blocks": 64, "num_threads": 1, "dtype": "float32", "load_policy": "load"}
    if offload is not None:
        options |= {"offload": offload, "nvme_path": str(tmp_path)}
    with LLM(str(servable), **options) as llm:
        whole = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        assert llm.reset_prefix_cache()
        stream = llm.stream(PROMPT, GREEDY)
        for _ in range(7):
            next(stream)
        llm.sleep()
        pool = llm._engine.control._need_port()._pool  # type: ignore[attr-defined]
        assert not pool.tensor.any(), "the system gave zeros for what it took"
        with pytest.raises(RequestError, match="asleep"):
            next(stream)
        llm.wake_up()
        with pytest.raises(StopIteration):
            next(stream)  # what was asked for while it slept has ended the request
        again = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]
        assert again.outputs[0].token_ids == whole
        if offload is not None:
            assert again.num_cached_tokens is not None and again.num_cached_tokens >= 64
        with pytest.raises(RequestError, match="level"):
            llm.sleep(level=2)


def test_a_stream_goes_on_after_sleep(servable: Path) -> None:
    options = {"num_gpu_blocks": 64, "num_threads": 1, "dtype": "float32"}
    with LLM(str(servable), offload="cpu=4MiB", **options) as llm:
        whole = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        stream = llm.stream(PROMPT, GREEDY)
        for _ in range(7):
            next(stream)
        llm.sleep()
        llm.wake_up()
        *_, last = stream
        assert last.outputs[0].token_ids == whole


def test_hints_of_generate(servable: Path) -> None:
    with LLM(str(servable), num_gpu_blocks=64, num_threads=1) as llm:
        hints = [KvHints(no_store=True), {"ttl": 5.0, "session_id": "s"}]
        llm.generate([PROMPT, "other " + PROMPT], GREEDY, use_tqdm=False, kv_hints=hints)
        (first,) = llm.generate(PROMPT, GREEDY, use_tqdm=False, kv_hints=hints[0])
        (second,) = llm.generate("other " + PROMPT, GREEDY, use_tqdm=False)
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens is not None and second.num_cached_tokens >= 64
        with pytest.raises(RequestError, match=r"kv_hints\.ttl"):
            llm.generate(PROMPT, GREEDY, kv_hints={"ttl": -1})
