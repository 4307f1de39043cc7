"""The executor: copies before the forward, logits of the wanted rows only, tables forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_steps import (
    eager_logits,
    load_tiny,
    make_runner,
    make_sequence,
    random_texts,
    run_chunked,
)
from tiny_models import VOCAB_SIZE, save_model

from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool
from tierkv.engine.plan import Plan, PlanRow
from tierkv.errors import ConfigError, InvariantError
from tierkv.model.attention import current_step
from tierkv.model.loaded import LoadedModel
from tierkv.model.runner import ModelRunner
from tierkv.types import BlockCopy


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(save_model("llama", tmp_path_factory.mktemp("llama")))


def _plan(*rows: PlanRow, copies: list[BlockCopy] | None = None) -> Plan:
    return Plan(list(rows), copies or [], sum(row.num_tokens for row in rows))


def test_only_wanted_rows_get_logits(loaded: LoadedModel) -> None:
    long, short = random_texts((20, 6), VOCAB_SIZE)
    runner = make_runner(loaded, 4, 16)
    first, second = make_sequence(1, long, [3, 9, 1, 7, 5]), make_sequence(2, short, [2, 8])
    logits = runner.run(_plan(PlanRow(first, 0, 12, 0, 0), PlanRow(second, 0, 6, 1, 1)))
    assert logits.shape == (1, VOCAB_SIZE) and logits.dtype is torch.float32
    torch.testing.assert_close(logits[0], eager_logits(loaded, short)[-1], rtol=0, atol=1e-4)
    assert runner.run(_plan(PlanRow(first, 12, 4, 0, 0))).shape == (0, VOCAB_SIZE)
    logits = runner.run(_plan(PlanRow(first, 16, 4, 1, 3)))
    torch.testing.assert_close(logits, eager_logits(loaded, long)[-3:], rtol=0, atol=1e-4)


def test_copies_run_before_the_forward(loaded: LoadedModel) -> None:
    (text,) = random_texts((10,), VOCAB_SIZE)
    runner = make_runner(loaded, 8, 8)
    parent = make_sequence(1, text, [4, 6])
    runner.run(_plan(PlanRow(parent, 0, 10, 1, 1)))
    before = runner.pool.tensor[6].clone()
    branches = [make_sequence(2 + token, [*text, token], [4, 1 + token]) for token in (0, 1)]
    copies = [BlockCopy(6, 1, 2), BlockCopy(6, 2, 2)]
    logits = runner.run(_plan(*(PlanRow(seq, 10, 1, 1, 1) for seq in branches), copies=copies))
    for row, seq in zip(logits, branches, strict=True):
        want = eager_logits(loaded, seq.token_ids)[-1]
        torch.testing.assert_close(row, want, rtol=0, atol=1e-4)
    assert torch.equal(runner.pool.tensor[6], before)


def test_tables_live_as_long_as_their_sequence(loaded: LoadedModel) -> None:
    runner = make_runner(loaded, 4, 16)
    for seq_id, text in enumerate(random_texts((5, 5, 5), VOCAB_SIZE)):
        seq = make_sequence(seq_id, text, [1 + 2 * seq_id, 2 + 2 * seq_id])
        runner.run(_plan(PlanRow(seq, 0, 5, 1, 1)))
    runner.forget(1)
    runner.forget(1)
    assert len(runner.tables) == 2


def test_a_moved_sequence_is_read_at_its_new_blocks(loaded: LoadedModel) -> None:
    """As after a preemption: other blocks, a new table version, everything computed again."""
    (text,) = random_texts((9,), VOCAB_SIZE)
    runner = make_runner(loaded, 4, 16)
    seq = make_sequence(1, text, [3, 4, 5])
    runner.run(_plan(PlanRow(seq, 0, 9, 1, 1)))
    runner.pool.tensor[3:6] = 99.0
    seq.block_table, seq.table_version = [10, 2, 12], 1
    logits = runner.run(_plan(PlanRow(seq, 0, 9, 1, 1)))
    torch.testing.assert_close(logits[0], eager_logits(loaded, text)[-1], rtol=0, atol=1e-4)
    assert runner.pool.tensor[3:6].eq(99.0).all()


def test_only_its_own_blocks_are_written(loaded: LoadedModel) -> None:
    runner = make_runner(loaded, 4, 16)
    (text,) = random_texts((7,), VOCAB_SIZE)
    runner.run(_plan(PlanRow(make_sequence(1, text, [5, 11]), 0, 7, 1, 1)))
    touched = runner.pool.tensor.flatten(1).ne(0).any(1).nonzero().flatten().tolist()
    assert touched == [5, 11]
    assert not runner.pool.tensor[11, :, :, :, 3].any()


def test_released_blocks_of_windowed_layers_are_not_needed(tmp_path: Path) -> None:
    """Behind a window the scheduler frees blocks and leaves 0 in the table."""
    windowed = load_tiny(save_model("mistral", tmp_path))
    (text,) = random_texts((30,), VOCAB_SIZE)
    runner = make_runner(windowed, 4, 16)
    seq = make_sequence(1, text, list(range(1, 9)))
    runner.run(_plan(PlanRow(seq, 0, 29, 0, 0)))
    runner.pool.tensor[:6] = 77.0  # positions 0..19; the token at 29 sees 22..29
    seq.block_table, seq.table_version = [0] * 5 + seq.block_table[5:], 1
    logits = runner.run(_plan(PlanRow(seq, 29, 1, 1, 1)))
    torch.testing.assert_close(logits[0], eager_logits(windowed, text)[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_bfloat16_stays_close_to_float32(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    texts = random_texts((40, 11), VOCAB_SIZE)
    exact = load_tiny(tmp_path)
    runner = make_runner(load_tiny(tmp_path, dtype="bfloat16"), 16, 12)
    for got, text in zip(run_chunked(runner, texts, 16), texts, strict=True):
        want = eager_logits(exact, text)
        error = (got - want).square().mean().sqrt() / want.std()
        assert float(error) < 0.1


def test_a_pool_of_another_shape_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="pool="):
        ModelRunner(loaded, GpuPool(KVLayout(3, 1, 16, 4, "float32"), 2, "cpu"))


def test_models_that_compute_all_logits(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = random_texts((9,), VOCAB_SIZE)
    forward = loaded.model.forward

    def without_selection(input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: object):  # type: ignore[no-untyped-def]
        return forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", without_selection)
    runner = make_runner(loaded, 4, 8)
    logits = runner.run(_plan(PlanRow(make_sequence(1, text, [1, 2, 3]), 0, 9, 1, 2)))
    monkeypatch.undo()
    torch.testing.assert_close(logits, eager_logits(loaded, text)[-2:], rtol=0, atol=1e-4)


def test_attention_outside_a_step_is_a_bug(loaded: LoadedModel) -> None:
    with pytest.raises(InvariantError, match="outside a step"):
        loaded.model(input_ids=torch.tensor([[1, 2]]), use_cache=False)


def test_the_context_ends_with_the_step(loaded: LoadedModel) -> None:
    with pytest.raises(ZeroDivisionError), current_step(None):  # type: ignore[arg-type]
        _ = 1 / 0
    with pytest.raises(InvariantError):
        loaded.model(input_ids=torch.tensor([[1, 2]]), use_cache=False)


def test_a_warm_up_changes_nothing(loaded: LoadedModel) -> None:
    runner = make_runner(loaded, 16, 4)
    runner.pool.tensor.copy_(torch.randn_like(runner.pool.tensor))
    before = runner.pool.tensor.clone()
    runner.warm_up()
    assert torch.equal(runner.pool.tensor, before)
