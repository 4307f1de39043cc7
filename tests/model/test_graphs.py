"""Decode steps over fixed buffers: the same logits as packed, for every family and batch size.

The backend repeats the computation itself, so all but the capture is what a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_tokens import generated
from model_steps import load_tiny, make_runner, make_sequence, random_texts
from tiny_models import FAMILIES, VOCAB_SIZE, save_model
from torch import Tensor

from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.request import Sequence
from tierkv.model.graphs import PlainBackend, batch_sizes
from tierkv.model.loaded import LoadedModel
from tierkv.model.runner import ModelRunner

BLOCK_SIZE, MAX_LEN, NUM_BLOCKS = 4, 40, 48
SIZES = (1, 2, 4, 6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(save_model("llama", tmp_path_factory.mktemp("llama")))


def decode(seqs: list[Sequence], at: int) -> Plan:
    """A step that computes token `at` of each."""
    return Plan([PlanRow(seq, at, 1, 1, 1) for seq in seqs], [], len(seqs))


def started(runner: ModelRunner, count: int, prompt: int = 9) -> list[Sequence]:
    """Sequences of 20 tokens whose first `prompt` are computed, their blocks scattered."""
    texts = random_texts((20,) * count, VOCAB_SIZE, seed=count)
    seqs = [
        make_sequence(n, text, [(1 + n + count * block) * 7 % NUM_BLOCKS for block in range(5)])
        for n, text in enumerate(texts)
    ]
    runner.run(Plan([PlanRow(seq, 0, prompt, 0, 0) for seq in seqs], [], prompt * count))
    return seqs


def captured(loaded: LoadedModel, sizes: tuple[int, ...] = SIZES) -> ModelRunner:
    runner = make_runner(loaded, BLOCK_SIZE, NUM_BLOCKS)
    runner.capture(sizes, MAX_LEN, PlainBackend())
    assert runner.graphs is not None and runner.graphs.sizes == sorted(sizes)
    return runner


def both(loaded: LoadedModel, count: int, steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of a few decode steps of `count` sequences, packed and by graphs."""
    found = []
    for runner in (make_runner(loaded, BLOCK_SIZE, NUM_BLOCKS), captured(loaded)):
        seqs = started(runner, count)
        found.append([runner.run(decode(seqs, 9 + step)).clone() for step in range(steps)])
    return found[0], found[1]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_logits_are_those_of_packed_steps(name: str, tmp_path: Path) -> None:
    loaded = load_tiny(save_model(name, tmp_path))
    packed, replayed = both(loaded, 5)
    for want, have in zip(packed, replayed, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_every_batch_size(llama: LoadedModel, count: int) -> None:
    packed, replayed = both(llama, count)
    for want, have in zip(packed, replayed, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_padding_writes_no_key_and_reads_none(llama: LoadedModel) -> None:
    runner = captured(llama)
    seqs = started(runner, 5)
    held = sorted({block for seq in seqs for block in seq.block_table})
    rest = [block for block in range(NUM_BLOCKS) if block not in held]
    runner.pool.tensor[rest] = torch.nan
    before = runner.pool.tensor.clone()
    assert torch.isfinite(runner.run(decode(seqs, 9))).all()
    changed = (runner.pool.tensor != before) & ~torch.isnan(before)
    assert set(changed.flatten(1).any(1).nonzero().flatten().tolist()) <= set(held)
    assert torch.isnan(runner.pool.tensor[rest]).all()


def test_a_smaller_step_leaves_nothing_of_a_larger_one(llama: LoadedModel) -> None:
    runner = captured(llama)
    seqs = started(runner, 6)
    want = runner.run(decode(seqs, 9)).clone()
    runner.run(decode(seqs[:1], 10))
    torch.testing.assert_close(runner.run(decode(seqs[2:5], 9)), want[2:5])


def test_what_is_no_decode_step_runs_packed(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = captured(llama)
    seqs = started(runner, 7)
    assert runner.graphs is not None
    monkeypatch.setattr(runner.graphs, "run", _refuse)
    runner.run(decode(seqs, 9))  # more rows than the largest graph has
    runner.run(Plan([PlanRow(seqs[0], 10, 1, 0, 0)], [], 1))  # no logits are wanted
    runner.run(Plan([PlanRow(seqs[0], 11, 2, 1, 1)], [], 2))
    with pytest.raises(AssertionError, match="by a graph"):
        runner.run(decode(seqs[:6], 10))


def test_a_context_beyond_the_tables_runs_packed(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(llama, BLOCK_SIZE, NUM_BLOCKS)
    runner.capture(SIZES, 12, PlainBackend())
    assert runner.graphs is not None
    monkeypatch.setattr(runner.graphs, "run", _refuse)
    seqs = started(runner, 2)
    with pytest.raises(AssertionError, match="by a graph"):
        runner.run(decode(seqs, 11))
    runner.run(decode(seqs, 12))


class Recorder(PlainBackend):
    """Knows which captured computation ran, by the order of capture."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.replayed: list[int] = []

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        replay, number = super().capture(run), self.num_captured
        self.num_captured += 1

        def noted() -> None:
            self.replayed.append(number)
            replay()

        return noted


def test_the_smallest_graph_that_fits_is_replayed(llama: LoadedModel) -> None:
    runner, backend = make_runner(llama, BLOCK_SIZE, NUM_BLOCKS), Recorder()
    runner.capture((1, 2, 5), MAX_LEN, backend)
    seqs = started(runner, 6)
    for at, count in enumerate((1, 2, 3, 4, 5, 6), 9):
        runner.run(decode(seqs[:count], at))
    assert backend.replayed == [2, 1, 0, 0, 0]  # the largest was captured first; 6 do not fit


def test_a_capture_is_told_the_most_there_can_be(llama: LoadedModel) -> None:
    """What the lists say then holds for every later step; in the tensors all rows are padding."""
    runner = make_runner(llama, BLOCK_SIZE, NUM_BLOCKS)
    seen: list[tuple[list[int], list[int], int]] = []
    forward = runner.forward

    def spy(step, out=None):  # type: ignore[no-untyped-def]
        meta = step.meta
        lens = meta.context_lens.tolist()
        seen.append((list(meta.context_len_list), lens, meta.block_tables.shape[1]))
        return forward(step, out)

    runner.forward = spy  # type: ignore[method-assign]
    runner.capture((1, 4), MAX_LEN, PlainBackend())
    width = MAX_LEN // BLOCK_SIZE
    assert seen == [([MAX_LEN] * 4, [0] * 4, width), ([MAX_LEN], [0], width)]


def test_padding_rows_have_finite_logits(llama: LoadedModel) -> None:
    """Though block 0, which new tables name, is NaN, and theirs are those of earlier rows."""
    runner = captured(llama, (4,))
    seqs = started(runner, 3)
    owned = {block for seq in seqs for block in seq.block_table}
    runner.pool.tensor[[b for b in range(NUM_BLOCKS) if b not in owned]] = torch.nan
    assert runner.graphs is not None
    for count in (3, 1):
        runner.graphs._buffers.logits.fill_(torch.nan)
        runner.run(decode(seqs[:count], 12 - count))
        assert runner.graphs._buffers.logits.isfinite().all()


def _refuse(*_: object) -> Tensor:
    raise AssertionError("by a graph")


class Refusing(PlainBackend):
    """A device on which the model does something that cannot be captured."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_a_model_that_cannot_be_captured_runs_without(
    llama: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make_runner(llama, BLOCK_SIZE, NUM_BLOCKS)
    runner.capture(SIZES, MAX_LEN, Refusing())
    assert runner.graphs is None
    (record,) = [r for r in caplog.records if "without graphs" in r.message]
    assert record.message.endswith("operation not permitted when stream is capturing")
    assert runner.run(decode(started(runner, 3), 9)).shape == (3, VOCAB_SIZE)


def test_the_ladder() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(5) == [1, 2, 4, 5]
    assert batch_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert batch_sizes(300)[-4:] == [256, 272, 288, 300]
    assert batch_sizes(2000)[-1] == 512
    assert batch_sizes(256, [12]) == [1, 2, 4, 8, 12]
    assert batch_sizes(256, [3, 7, 400]) == [3, 7]
    assert batch_sizes(2, [3, 7]) == [2]


@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks": 24, "offload": "cpu=1MiB"}])
def test_an_engine_generates_the_same_tokens(tmp_path: Path, options: dict[str, object]) -> None:
    directory = save_model("gemma2", tmp_path)
    texts = random_texts((3, 17, 30, 9, 41, 5, 26), VOCAB_SIZE)
    found = []
    for is_captured in (False, True):
        config = EngineConfig.from_mapping(
            {"model": str(directory), "dtype": "float32", "num_threads": 1, "num_gpu_blocks": 60,
             "max_model_len": 120, "verify_model": False, "preemption_mode": "recompute",
             **options}
        )  # fmt: skip
        core = EngineCore.from_config(config)
        if is_captured:
            core.steps.executor.capture((1, 2, 4, 8), 120, PlainBackend())  # type: ignore[attr-defined]
        found.append(generated(core, texts, num_tokens=24))
        core.close()
    assert found[0] == found[1]
