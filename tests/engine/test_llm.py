"""`LLM` on a tiny random model: prompts in all forms, stops, streams, aborts, bad input."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from text_models import EOS_ID, VOCAB_SIZE
from tiny_models import save_config, save_model
from transformers import AutoModelForCausalLM

from tierkv import LLM, SamplingParams
from tierkv.errors import ConfigError, EngineDeadError, RequestError, UnsupportedModelError

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 8,
    "num_gpu_blocks": 64,
    "max_model_len": 256,
    "max_num_batched_tokens": 48,
    "num_threads": 1,
}
TEXT = "the code of the fox"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    with LLM(str(text_model), **OPTIONS) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the engine is idle, holds no block, and still answers."""
    yield
    if "llm" not in request.fixturenames:
        return
    engine: LLM = request.getfixturevalue("llm")
    engine.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)
    metrics = engine.metrics()
    assert (metrics["running"], metrics["waiting"], metrics["gpu_blocks_used"]) == (0, 0, 0)
    assert len(engine._outputs) == 0
    assert engine.reset_prefix_cache()


def run(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[Any]:
    return llm.generate(prompts, params, use_tqdm=False)


def texts(outputs: list[Any]) -> list[list[str]]:
    return [[c.text for c in output.outputs] for output in outputs]


# -- generate ------------------------------------------------------------------------------------


def test_a_prompt_may_take_every_form(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(TEXT)
    forms: list[Any] = [TEXT, {"prompt": TEXT}, {"prompt_token_ids": ids}, ids]
    single = [run(llm, form) for form in [*forms, {"prompt": TEXT, "cache_salt": "x"}]]
    together = run(llm, forms)
    assert all(len(outputs) == 1 for outputs in single) and len(together) == 4
    tokens = {tuple(out.outputs[0].token_ids) for outs in [*single, together] for out in outs}
    assert len(tokens) == 1
    assert [out.prompt for out in together] == [TEXT, TEXT, None, None]
    assert all(out.prompt_token_ids == ids for out in together)
    assert texts(together) == [[llm.get_tokenizer().decode([*tokens.pop()])]] * 4


def test_outputs_are_in_the_order_of_prompts_with_their_own_params(llm: LLM) -> None:
    prompts = ["a", "the fox", "seven", "is"]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5, 3)]
    outputs = run(llm, prompts, params)
    assert [out.prompt for out in outputs] == prompts
    assert [len(out.outputs[0].token_ids) for out in outputs] == [9, 1, 5, 3]
    assert [out.outputs[0].finish_reason for out in outputs] == ["length"] * 4
    assert run(llm, []) == []


def test_defaults_and_request_metrics(llm: LLM) -> None:
    (output,) = llm.generate(TEXT, use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 16
    assert output.finished and output.metrics is not None
    m = output.metrics
    assert m.first_scheduled_s and m.first_token_s and m.finished_s
    assert m.arrival_s <= m.first_scheduled_s <= m.first_token_s <= m.finished_s


def test_reuse_is_reported(llm: LLM) -> None:
    (first,) = run(llm, TEXT * 4)
    (second,) = run(llm, TEXT * 4)
    (salted,) = run(llm, {"prompt": TEXT * 4, "cache_salt": "other tenant"})
    assert first.num_cached_tokens == salted.num_cached_tokens == 0
    assert second.num_cached_tokens >= len(first.prompt_token_ids) - 8
    assert llm.reset_prefix_cache()
    (third,) = run(llm, TEXT * 4)
    assert third.num_cached_tokens == 0
    assert len({tuple(out.outputs[0].token_ids) for out in (first, second, third)}) == 1


def test_parallel_samples(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=10, ignore_eos=True)
    alone = run(llm, TEXT, params)
    beside = run(llm, ["seven", TEXT, "the house is seven"], params)
    assert [c.index for c in alone[0].outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in alone[0].outputs}) == 4
    assert texts(alone)[0] == texts(beside)[1]  # a seed does not depend on the batch
    assert texts(alone) != texts(run(llm, TEXT, SamplingParams(n=4, seed=8, max_tokens=10)))


@pytest.mark.parametrize("offload", [None, "cpu=4MiB"])
def test_a_closed_engine_says_so(text_model: Path, offload: str | None) -> None:
    closed = LLM(str(text_model), num_gpu_blocks=32, num_threads=1, offload=offload)
    closed.close()
    with pytest.raises(EngineDeadError, match="closed"):
        run(closed, TEXT)
    closed.close()


def test_priorities_are_taken(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=[1, -1])
    assert len(outputs) == 2
    with pytest.raises(RequestError, match="priority"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=[1])
    with pytest.raises(RequestError, match="priority='high'"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=[1, "high"])  # type: ignore[list-item]


def test_a_progress_bar(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capfd.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


# -- what ends a sequence ------------------------------------------------------------------------


def test_stop_strings_across_token_borders(llm: LLM) -> None:
    (whole,) = run(llm, TEXT, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    text = whole.outputs[0].text
    middle = len(text) // 2
    for size in (1, 2, 5):
        stop = text[middle : middle + size]
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=[stop])
        (output,) = run(llm, TEXT, params)
        (completion,) = output.outputs
        assert completion.text == text[: text.index(stop)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert len(completion.token_ids) < 30


def test_stop_strings_end_one_sample_of_several(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True)
    (free,) = run(llm, TEXT, params)
    stop = free.outputs[1].text[3:5]
    params = SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True, stop=stop)
    (output,) = run(llm, TEXT, params)
    for with_stop, without in zip(output.outputs, free.outputs, strict=True):
        head, found, _ = without.text.partition(stop)
        assert with_stop.text == head
        assert with_stop.finish_reason == ("stop" if found else "length")


def test_eos_stop_ids_and_min_tokens(llm: LLM) -> None:
    always_eos = {"logit_bias": {EOS_ID: 100.0}, "temperature": 0.0, "max_tokens": 8}
    (output,) = run(llm, TEXT, SamplingParams(**always_eos))
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([EOS_ID], "stop")
    assert output.outputs[0].text == "" and output.outputs[0].stop_reason is None
    (output,) = run(llm, TEXT, SamplingParams(**always_eos, ignore_eos=True))
    assert output.outputs[0].token_ids == [EOS_ID] * 8
    (output,) = run(llm, TEXT, SamplingParams(**always_eos, min_tokens=3))
    assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].token_ids[-1] == EOS_ID
    (greedy,) = run(llm, TEXT)
    stop_id = greedy.outputs[0].token_ids[4]
    params = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=[stop_id])
    (output,) = run(llm, TEXT, params)
    assert output.outputs[0].stop_reason == stop_id
    assert output.outputs[0].token_ids[-1] == stop_id


def test_no_max_tokens_runs_to_the_context_s_end(llm: LLM) -> None:
    ids = [5] * 240
    (output,) = run(llm, ids, SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 256 - 240


# -- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_equal_transformers(llm: LLM, text_model: Path) -> None:
    """Of the prompt (in several chunks) and of the output, against one plain forward."""
    params = SamplingParams(
        temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    (output, _) = run(llm, [TEXT * 12, "the house"], params)
    ids, (completion,) = output.prompt_token_ids, output.outputs
    assert len(ids) > OPTIONS["max_num_batched_tokens"]
    model = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([ids + completion.token_ids])).logits[0]
    expected = logits.log_softmax(-1)
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(ids)
    entries = [*output.prompt_logprobs[1:], *completion.logprobs]
    assert len(entries) == len(ids) + 5
    total = 0.0
    for position, entry in enumerate(entries):
        chosen = (ids + completion.token_ids)[position + 1]
        row = expected[position]
        assert entry is not None and chosen in entry
        best = row.topk(3 if position >= len(ids) - 1 else 2).indices.tolist()
        assert set(entry) == {*best, chosen}
        for token, found in entry.items():
            assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert found.decoded_token == llm.get_tokenizer().decode([token])
        total += entry[chosen].logprob if position >= len(ids) - 1 else 0.0
    assert completion.cumulative_logprob == pytest.approx(total)


# -- chat ----------------------------------------------------------------------------------------


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "is the fox in?"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "<|user|>is the fox in?\n<|assistant|>"
    assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt)
    two = llm.chat([messages, messages * 2], GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert [out.prompt for out in two] == ["<|user|>is the fox in?\n" * n for n in (1, 2)]
    template = "{{ messages[0]['content'] }}!"
    (own,) = llm.chat(messages, GREEDY, use_tqdm=False, chat_template=template)
    assert own.prompt == "is the fox in?!"


@pytest.mark.parametrize("messages", [[], "hello", [{"content": "no role"}], [[]]])
def test_bad_messages(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        llm.chat(messages, GREEDY, use_tqdm=False)


def test_a_template_that_fails(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the chat template fails"):
        llm.chat([{"role": "user", "content": "x"}], chat_template="{{ 1 / 0 }}", use_tqdm=False)


# -- stream and abort ----------------------------------------------------------------------------


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    (whole,) = run(llm, TEXT)
    outputs = list(llm.stream(TEXT, GREEDY))
    assert len(outputs) == 12
    for shorter, longer in itertools.pairwise(outputs):
        assert longer.outputs[0].text.startswith(shorter.outputs[0].text)
        assert len(longer.outputs[0].token_ids) == len(shorter.outputs[0].token_ids) + 1
    assert [out.finished for out in outputs] == [False] * 11 + [True]
    assert outputs[-1].outputs[0].text == whole.outputs[0].text


def test_streams_and_generate_run_side_by_side(llm: LLM) -> None:
    expected = [run(llm, prompt)[0].outputs[0].text for prompt in ("a", "the fox")]
    one, two = llm.stream("a", GREEDY), llm.stream("the fox", GREEDY)
    next(one), next(two)
    assert run(llm, "seven")  # carries both streams along
    last = [list(one)[-1], list(two)[-1]]
    assert [out.outputs[0].text for out in last] == expected


def test_abort_in_the_middle_of_a_stream(llm: LLM) -> None:
    stream = llm.stream(TEXT, SamplingParams(max_tokens=100, ignore_eos=True))
    first = next(stream)
    llm.abort(first.request_id)
    (last,) = list(stream)
    assert last.finished and last.outputs[0].finish_reason == "abort"
    llm.abort("never seen")


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_a_stream_left_early_is_aborted(llm: LLM, num_taken: int) -> None:
    stream = llm.stream(TEXT, SamplingParams(n=2, max_tokens=100, ignore_eos=True))
    for _ in range(num_taken):
        next(stream)
    del stream
    assert llm.metrics()["gpu_blocks_used"] == 0


def test_an_interrupt_aborts_everything(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Ctrl-C in the middle of a step takes effect after it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    before = llm.metrics()
    step, num_steps = llm._engine.step, itertools.count(1)

    def interrupted_step() -> Any:
        if next(num_steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm._engine, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        run(llm, ["a", "b", "c"], SamplingParams(max_tokens=None, ignore_eos=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    after = llm.metrics()
    assert after["steps"] == before["steps"] + 4
    assert after["finished_abort"] == before["finished_abort"] + 3
    assert after["gpu_blocks_used"] == 0


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([1, 2, VOCAB_SIZE], "prompt_token_ids"),
        ([-1], "prompt_token_ids"),
        ([2**70], "prompt_token_ids"),
        ({"prompt_token_ids": [1, "two"]}, "prompt_token_ids"),
        ({"prompt": 5}, "prompt"),
        ({"text": "a"}, "text"),
        ({}, "prompt"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt"),
        ("half a pair \ud800", "prompt"),
        ([5] * 256, "prompt"),
        (7, "prompts"),
        (None, "prompts"),
    ],
    ids=repr,
)
def test_one_bad_prompt_refuses_the_whole_call(llm: LLM, prompt: Any, field: str) -> None:
    steps = llm.metrics()["steps"]
    batch = prompt if prompt in (7, None) else ["fine", prompt]
    if prompt == []:
        batch = ["fine", {"prompt_token_ids": []}]
    with pytest.raises(RequestError) as caught:
        run(llm, batch)
    assert caught.value.field == field
    metrics = llm.metrics()
    assert (metrics["running"], metrics["waiting"], metrics["steps"]) == (0, 0, steps)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"max_tokens": 3}, "sampling_params"),
        ([GREEDY], "sampling_params"),
        ([GREEDY, None], "sampling_params"),
        (SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
    ],
    ids=repr,
)
def test_bad_parameters(llm: LLM, params: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        run(llm, ["a", "b"], params)
    assert caught.value.field == field


def test_a_sample_count_that_never_fits(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n=1000"):
        run(llm, "a", SamplingParams(n=1000))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_gpu_block": 64}, "num_gpu_blocks"),
        ({"dtype": "float13"}, "dtype"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"eviction_policy": "newest"}, "eviction_policy"),
        ({"tokenizer": "no/such/directory/anywhere"}, "tokenizer"),
    ],
    ids=str,
)
def test_bad_options_name_the_option(text_model: Path, options: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LLM(str(text_model), **{**OPTIONS, **options})


def test_an_architecture_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        LLM(str(save_config("mamba", tmp_path)), load_format="dummy")


def test_a_model_without_tokenizer_speaks_token_ids(tmp_path: Path) -> None:
    with LLM(str(save_model("llama", tmp_path)), **OPTIONS) as bare:
        assert bare.get_tokenizer() is None
        (output,) = run(bare, [1, 2, 3])
        assert len(output.outputs[0].token_ids) == 12 and output.outputs[0].text == ""
        for call in (lambda: run(bare, "text"), lambda: bare.chat([{"role": "user"}])):
            with pytest.raises(RequestError, match="no tokenizer"):
                call()
        with pytest.raises(RequestError, match="no tokenizer"):
            run(bare, [1], SamplingParams(stop="x"))
    bare.close()
