"""Beam search against transformers' own, and its rules one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from text_models import EOS_ID, VOCAB_SIZE
from transformers import AutoModelForCausalLM, PreTrainedModel

from tierkv import LLM, BeamSearchParams, SamplingParams
from tierkv.engine.beam import BeamSearch
from tierkv.engine.outputs import SequenceOutput
from tierkv.errors import RequestError
from tierkv.types import Logprob

PROMPTS = [[5], [7, 9, 200, 31], list(range(10, 60)), [7, 9, 200, 32]]


@pytest.fixture(scope="module")
def model(text_model: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    with torch.no_grad():  # make the end of sequence likely enough to happen at all lengths
        loaded.lm_head.weight[EOS_ID] = loaded.lm_head.weight[40:46].sum(0) * 0.7
    return loaded.eval()


@pytest.fixture(scope="module")
def llm(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = tmp_path_factory.mktemp("beam-model")
    model.save_pretrained(directory)
    with LLM(
        str(directory), dtype="float32", block_size=4, num_gpu_blocks=128, num_threads=1
    ) as engine:
        yield engine


def reference(
    model: PreTrainedModel, prompt: list[int], eos: list[int] | None, **params: Any
) -> tuple[list[list[int]], list[float]]:
    """Token ids (without padding) and scores, best first."""
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=params["beam_width"],
        num_return_sequences=params["beam_width"],
        max_new_tokens=params["max_tokens"],
        length_penalty=params["length_penalty"],
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=VOCAB_SIZE - 1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = found.sequences[:, len(prompt) :].tolist()
    for row in rows:
        while row and row[-1] == VOCAB_SIZE - 1:
            row.pop()
    return rows, found.sequences_scores.tolist()


@pytest.mark.parametrize("beam_width", [2, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_sequences_and_scores_are_transformers(
    llm: LLM, model: PreTrainedModel, beam_width: int, length_penalty: float, ignore_eos: bool
) -> None:
    params: dict[str, Any] = {
        "beam_width": beam_width,
        "max_tokens": 9,
        "length_penalty": length_penalty,
    }
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(**params, ignore_eos=ignore_eos))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        rows, scores = reference(model, prompt, None if ignore_eos else [EOS_ID], **params)
        assert output.prompt_token_ids == prompt
        assert [s.token_ids for s in output.sequences] == rows
        assert [s.score for s in output.sequences] == pytest.approx(scores, abs=1e-4)
        for s in output.sequences:
            has_ended = s.token_ids[-1] == EOS_ID and not ignore_eos
            assert s.finish_reason == ("stop" if has_ended else "length")
            length = len(s.token_ids) ** length_penalty
            assert s.score == pytest.approx(s.cumulative_logprob / length)
    assert llm.metrics()["gpu_blocks_used"] == 0


def test_some_searches_end_early_and_some_do_not(llm: LLM) -> None:
    """The comparison above covers both ends; this keeps it so."""
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=5, max_tokens=9))
    reasons = {s.finish_reason for output in outputs for s in output.sequences}
    lengths = {len(s.token_ids) for output in outputs for s in output.sequences}
    assert reasons == {"stop", "length"}
    assert len(lengths) > 2


def test_one_beam_is_greedy(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    greedy = llm.generate(PROMPTS, params, use_tqdm=False)
    found = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))
    assert [o.sequences[0].token_ids for o in found] == [o.outputs[0].token_ids for o in greedy]


def test_streams_go_on_beside_a_search(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    (expected,) = llm.generate([[5, 6]], params, use_tqdm=False)
    stream = llm.stream([5, 6], params)
    next(stream)
    llm.beam_search([[5]], BeamSearchParams(beam_width=3, max_tokens=12))
    assert list(stream)[-1].outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 1.5}, "beam_width"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens"),
        ({"beam_width": 2, "temperature": 0.5}, "temperature"),
        ({"beam_width": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"beam_width": 2, "length_penalty": "1"}, "length_penalty"),
    ],
    ids=repr,
)
def test_bad_parameters(values: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError) as caught:
        BeamSearchParams(**values)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("prompts", "width"), [([[5], [VOCAB_SIZE]], 2), ([[5], "text"], 2), ([[5]], 300), ([[5]], 600)]
)
def test_a_refused_search_leaves_nothing(llm: LLM, prompts: Any, width: int) -> None:
    num_steps = llm.metrics()["steps"]
    with pytest.raises(RequestError) as caught:
        llm.beam_search(prompts, BeamSearchParams(beam_width=width))
    assert width == 2 or f"beam_width={width}:" in str(caught.value)
    metrics = llm.metrics()
    assert metrics["steps"] == num_steps
    assert (metrics["running"], metrics["waiting"], metrics["gpu_blocks_used"]) == (0, 0, 0)
    assert llm.beam_search([[5]], BeamSearchParams(beam_width=2, max_tokens=2))


class Tape:
    """A stepped engine that only records what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._next_id = 100

    def advance(self, seq_id: int, token_id: int) -> None:
        self.calls.append(("advance", seq_id, token_id))

    def fork(self, seq_id: int, token_id: int) -> int:
        self._next_id += 1
        self.calls.append(("fork", seq_id, token_id, self._next_id))
        return self._next_id

    def drop(self, seq_id: int) -> None:
        self.calls.append(("drop", seq_id))


def candidates(seq_id: int, **logprobs: float) -> SequenceOutput:
    entry = {int(t[1:]): Logprob(lp, i + 1) for i, (t, lp) in enumerate(logprobs.items())}
    return SequenceOutput("r", seq_id, 0, [], logprobs=[entry])


def test_forks_come_before_the_advance_and_drops_before_both() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=5)
    search, tape = BeamSearch("r", None, [1], params, frozenset({EOS_ID})), Tape()
    search.proceed(tape)
    assert tape.calls == []  # nothing has run yet
    search.update(candidates(1, t5=-1.0, t6=-1.5, t7=-4.0, t8=-5.0))
    search.proceed(tape)
    assert tape.calls == [("fork", 1, 5, 101), ("advance", 1, 6)]
    search.update(candidates(101, t5=-9.0, t6=-9.5, t7=-9.9, t8=-9.95))
    search.proceed(tape)
    assert len(tape.calls) == 2  # the other beam's candidates are missing
    search.update(candidates(1, t8=-0.1, t9=-0.2, t10=-3.0, t11=-4.0))
    search.proceed(tape)
    assert tape.calls[2:] == [("drop", 101), ("fork", 1, 8, 102), ("advance", 1, 9)]
    assert not search.is_finished
