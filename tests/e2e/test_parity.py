"""Greedy tokens of the whole engine equal transformers', for every family and many settings.

fp32, random weights of standard deviation 0.12. A different token is excused only where the
reference's two best logits are closer than 1e-4, in at most 1 % of the sequences, and printed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams

NEAR_TIE = 1e-4
MAX_TOKENS = 16
ROOMY, TIGHT = "roomy", "tight"
# Every value of each column meets every value of the others over the families.
SETTINGS = [
    (1, True, ROOMY),
    (16, True, TIGHT),
    (64, False, ROOMY),
    (16, False, TIGHT),
    (1, True, TIGHT),
    (64, True, ROOMY),
    (16, True, ROOMY),
    (1, False, TIGHT),
    (64, True, TIGHT),
]
FULL = [
    (block_size, reuse, pool)
    for block_size in (1, 16, 64)
    for reuse in (True, False)
    for pool in (ROOMY, TIGHT)
]
PAIRWISE = [
    pytest.param(family, *setting, id=f"{family}-{setting[0]}-{setting[1]}-{setting[2]}")
    for number, family in enumerate(FAMILIES)
    for setting in (SETTINGS[number % 9], SETTINGS[(number + 4) % 9])
]
PRODUCT = [
    pytest.param(family, *setting, marks=pytest.mark.full)
    for family in FAMILIES
    for setting in FULL
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def directory_of(family: str, known: dict[str, Path], factory: pytest.TempPathFactory) -> Path:
    if family not in known:
        known[family] = save_model(family, factory.mktemp(family))
    return known[family]


def make_prompts(seed: int) -> list[list[int]]:
    """Two groups that share a prefix of 70 and 37 tokens, and strangers; 3 to 150 tokens."""
    rng = random.Random(seed)

    def text(length: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(length)]

    long_prefix, short_prefix = text(70), text(37)
    prompts = [long_prefix + text(n) for n in (1, 30, 80)]
    prompts += [short_prefix + text(n) for n in (2, 9)]
    prompts += [text(3), text(48), text(101)]
    return prompts


def reference(directory: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Greedy continuations by transformers' eager attention, and the gap of the two best."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return [greedy(model, prompt) for prompt in prompts]


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    tokens, gaps = list(prompt), []
    for _ in range(MAX_TOKENS):
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        best = torch.topk(logits, 2)
        gaps.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], gaps


def blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def run_engine(
    directory: Path, prompts: list[list[int]], **options: Any
) -> tuple[list[list[int]], dict[str, Any]]:
    """All prompts at once through an engine; its laws are checked after every step."""
    config = EngineConfig(
        model=str(directory),
        dtype="float32",
        max_num_batched_tokens=64,
        verify_model=False,
        num_threads=1,
        **options,
    )
    core = EngineCore.from_config(config)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        core.add_request(EngineRequest(str(number), prompt, params))
    outputs: list[list[int]] = [[] for _ in prompts]
    while core.has_work:
        for output in core.step():
            outputs[int(output.request_id)].extend(output.new_token_ids)
        core.check()
    return outputs, core.metrics()


class Excuses:
    """Near ties over all tests of this module."""

    num_sequences = 0
    gaps: ClassVar[list[float]] = []


def assert_same(outputs: list[list[int]], expected: list[tuple[list[int], list[float]]]) -> None:
    for got, (want, gaps) in zip(outputs, expected, strict=True):
        Excuses.num_sequences += 1
        if got != want:
            at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
            assert gaps[at] < NEAR_TIE, f"token {at}: {got} != {want} (gap {gaps[at]})"
            print(f"excused: token {at}, gap {gaps[at]:.2e}")
            Excuses.gaps.append(gaps[at])


@pytest.mark.parametrize(("family", "block_size", "reuse", "pool"), [*PAIRWISE, *PRODUCT])
def test_tokens_equal_transformers(
    family: str,
    block_size: int,
    reuse: bool,
    pool: str,
    directories: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = directory_of(family, directories, tmp_path_factory)
    prompts = make_prompts(len(family))
    longest = max(len(prompt) for prompt in prompts) + MAX_TOKENS
    num_blocks = blocks_of(longest, block_size) * (40 if pool == ROOMY else 1) + (pool == TIGHT)
    outputs, metrics = run_engine(
        directory,
        prompts,
        block_size=block_size,
        num_gpu_blocks=num_blocks,
        enable_prefix_caching=reuse,
    )
    assert_same(outputs, reference(directory, prompts))
    if pool == ROOMY:
        assert (metrics["hit_tokens"] > 0) == reuse
    assert metrics["gpu_blocks_used"] == 0


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma2", "qwen3-moe", "opt"])
def test_repeated_preemption_changes_no_token(
    family: str,
    block_size: int,
    directories: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Short prompts that are admitted together and outgrow the pool together."""
    directory = directory_of(family, directories, tmp_path_factory)
    prompts = [prompt[:20] for prompt in make_prompts(3)]
    outputs, metrics = run_engine(
        directory, prompts, block_size=block_size, num_gpu_blocks=blocks_of(100, block_size)
    )
    assert_same(outputs, reference(directory, prompts))
    assert metrics["preemptions"] > 0
    assert metrics["hit_tokens"] > 0


def test_excuses_are_rare() -> None:
    """Runs last: at most one sequence in a hundred was a near tie."""
    assert len(Excuses.gaps) <= Excuses.num_sequences * 0.01, Excuses.gaps
