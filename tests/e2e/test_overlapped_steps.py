"""Overlapped steps: a step is launched before the last one's tokens are read, and nobody can tell.

Every kind of request at once, through pools and tiers that preempt them: the same tokens, texts,
log-probabilities and ends as when each step is read before the next is planned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tokens import generated
from tiny_models import VOCAB_SIZE, save_model

from tierkv import LLM, SamplingParams
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.grammar_params import StructuredOutputsParams
from tierkv.engine.plan import Plan
from tierkv.errors import ConfigError
from tierkv.model.graphs import PlainBackend
from tierkv.model.inputs import LateTokens, StepInputs

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 4,
    "max_model_len": 128,
    "max_num_batched_tokens": 32,
    "num_threads": 1,
    "verify_model": False,
    "seed": 3,
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": list(range(0, 200, 3))},
    {"temperature": 0.0, "stop": ["e", "a", "1"]},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
    {"temperature": 1.0, "seed": 1, "top_k": 8},
    {"temperature": 0.8, "seed": 2, "top_p": 0.9},
    {"temperature": 1.0, "seed": 4, "n": 3},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 5, "logit_bias": {5: 9.0, 6: 9.0}, "presence_penalty": 1.5},
    {"temperature": 0.0, "max_tokens": 1},
]
PROMPTS = [f"{'many of them say ' * (n % 4)}number {n}" for n in range(len(KINDS))]
MODES = [
    pytest.param({"num_gpu_blocks": 400}, id="roomy"),
    pytest.param({"num_gpu_blocks": 40, "preemption_mode": "recompute"}, id="recompute"),
    pytest.param(
        {"num_gpu_blocks": 40, "preemption_mode": "swap", "offload": "cpu=8MiB"}, id="swap"
    ),
    pytest.param(
        {"num_gpu_blocks": 40, "offload": "cpu=8MiB", "oversubscribe": True, "time_slice": 4},
        id="turns",
    ),
]


class Watch:
    """Wraps an engine's executor; counts the tokens that the host did not know at launch."""

    def __init__(self, llm: LLM) -> None:
        self.num_late = 0
        steps = llm._engine.steps  # type: ignore[union-attr]
        self._executor, steps.executor = steps.executor, self  # type: ignore[assignment]

    def run(self, plan: Plan) -> torch.Tensor:
        ends = [row.start + row.num_tokens - len(row.seq.token_ids) for row in plan.rows]
        assert max(ends) <= 1
        self.num_late += ends.count(1)
        logits: torch.Tensor = self._executor.run(plan)
        return logits

    def forget(self, seq_id: int) -> None:
        self._executor.forget(seq_id)


def answers(llm: LLM) -> Iterator[Any]:
    params = [SamplingParams(**{"max_tokens": 14, **kind}) for kind in KINDS]
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        yield rounded(output.prompt_logprobs)
        for c in output.outputs:
            yield c.token_ids, c.text, rounded(c.logprobs), c.finish_reason, c.stop_reason


def rounded(positions: Any) -> Any:
    """Log-probabilities as far as they do not depend on who else is in the batch."""
    return positions and [
        position and {token: round(entry.logprob, 3) for token, entry in position.items()}
        for position in positions
    ]


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_request_gets_the_same(servable: Path, mode: dict[str, Any]) -> None:
    found, num_late = [], []
    for is_overlapped in (False, True):
        options = {**OPTIONS, **mode, "async_scheduling": is_overlapped}
        with LLM(str(servable), **options) as llm:
            watch = Watch(llm)
            found.append([list(answers(llm)) for _ in range(2)])  # the second from cached prompts
            num_late.append(watch.num_late)
            llm._engine.check()  # type: ignore[union-attr]
            metrics = llm.metrics()
            assert (metrics["running"], metrics["gpu_blocks_used"]) == (0, 0)
            assert bool(metrics["swaps"]) is ("offload" in mode)
            assert metrics["hit_tokens"] > 0
            assert llm.reset_prefix_cache()
    assert found[0] == found[1]
    assert num_late[0] == 0
    assert num_late[1] > 50


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_graphs_take_tokens_from_the_device(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps that replay, mixed with prompts that arrive at any time."""
    directory = save_model(family, tmp_path)
    rng = random.Random()
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([3, 9, 40]))] for _ in range(9)]
    found = []
    for is_overlapped in (False, True):
        config = EngineConfig(
            model=str(directory), **OPTIONS, num_gpu_blocks=200, async_scheduling=is_overlapped
        )
        core = EngineCore.from_config(config)
        core.steps.executor.capture((1, 2, 4, 8), 120, PlainBackend())  # type: ignore[attr-defined]
        replayed = spy_on_late_tokens(core, monkeypatch)
        found.append(generated(core, texts, num_tokens=20, steps_between=3))
        assert any(replayed) is is_overlapped and len(replayed) > 20
        core.close()
    assert found[0] == found[1]


def spy_on_late_tokens(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step that will be replayed, whether some of its tokens were on the device alone."""
    graphs, replayed = core.steps.executor.graphs, list[bool]()  # type: ignore[attr-defined]
    run = graphs.run

    def noted(step: StepInputs, late: LateTokens | None = None) -> torch.Tensor:
        replayed.append(late is not None)
        logits: torch.Tensor = run(step, late)
        return logits

    monkeypatch.setattr(graphs, "run", noted)
    return replayed


def test_an_abort_while_a_step_is_under_way(servable: Path) -> None:
    """Its blocks are free at once, others get them, and nobody's tokens change."""
    config = EngineConfig(model=str(servable), **OPTIONS, num_gpu_blocks=34, async_scheduling=True)
    core = EngineCore.from_config(config)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)

    def run(name: str) -> list[int]:
        core.add_request(EngineRequest(name, list(range(60)), params))
        tokens: list[int] = []
        while core.has_work:
            tokens += [t for o in core.step() if o.request_id == name for t in o.new_token_ids]
        return tokens

    expected = run("alone")
    choices = ["long" * 20, "longer" * 20]
    bound = SamplingParams(
        temperature=0.0, max_tokens=30, structured_outputs=StructuredOutputsParams(choice=choices)
    )
    core.add_request(EngineRequest("gone", list(range(100, 180)), bound))
    for _ in range(6):
        core.step()
    assert core.steps.is_busy
    core.abort(["gone"])
    assert core.metrics()["gpu_blocks_used"] == 0
    core.check()
    assert run("after") == expected
    core.close()


def test_with_tensor_parallelism_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="async_scheduling"):
        EngineConfig(async_scheduling=True, tensor_parallel_size=2)
    assert EngineConfig(async_scheduling=False, tensor_parallel_size=2).async_scheduling is False
