"""Rotary factors that would change with the length of other sequences are settled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_steps import eager_logits, load_tiny, make_runner, random_texts, run_chunked
from tiny_models import VOCAB_SIZE, save_model

from tierkv.errors import ConfigError
from tierkv.model import rope

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 32.0,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    values = {"rope_parameters": LONGROPE, "sliding_window": None}
    return save_model("phi3", tmp_path, original_max_position_embeddings=64, **values)


def _check(directory: Path, lengths: tuple[int, ...], compared: int, **options: Any) -> None:
    """Texts computed together, packed, against each alone by untouched transformers."""
    plain = load_tiny(directory)
    for module in plain.model.modules():
        if hasattr(module, "rope_type"):
            module.rope_type = "longrope"  # transformers' own switch, which loading settles
    texts = random_texts(lengths, VOCAB_SIZE)
    runner = make_runner(load_tiny(directory, **options), 16, 32)
    found = run_chunked(runner, texts, 24)
    want = eager_logits(plain, texts[compared])
    torch.testing.assert_close(found[compared], want, rtol=0, atol=1e-4)


def test_short_factors_up_to_the_original_length(directory: Path) -> None:
    assert load_tiny(directory).max_model_len == 64
    _check(directory, (60, 30), 1)


def test_long_factors_for_all_when_more_is_asked_for(directory: Path) -> None:
    loaded = load_tiny(directory, max_model_len=1000)
    assert loaded.max_model_len == 2048
    assert loaded.fingerprint != load_tiny(directory).fingerprint
    _check(directory, (60, 130), 1, max_model_len=1000)


def test_a_length_within_reach_changes_nothing(directory: Path) -> None:
    assert load_tiny(directory, max_model_len=50).fingerprint == load_tiny(directory).fingerprint


def test_other_kinds_keep_their_length(tmp_path: Path) -> None:
    assert load_tiny(save_model("llama", tmp_path), max_model_len=9999).max_model_len == 2048


def test_long_factors_that_cannot_be_fixed(directory: Path) -> None:
    loaded = load_tiny(directory)
    with pytest.raises(ConfigError, match=r"max_model_len=1000.*64"):
        rope.fix_length(torch.nn.Linear(1, 1), loaded.config, 1000)


def test_factors_made_anew_at_every_forward_are_refused(tmp_path: Path) -> None:
    """PhiMoE's module scales all positions by the longest, and does not read its buffer."""
    scales = {"short_mscale": 1.1, "long_mscale": 1.9}
    values = {"rope_parameters": LONGROPE | scales, "original_max_position_embeddings": 64}
    directory = save_model("phimoe", tmp_path, **values)
    assert load_tiny(directory).max_model_len == 64
    with pytest.raises(ConfigError, match=r"max_model_len=1000.*64"):
        load_tiny(directory, max_model_len=1000)
