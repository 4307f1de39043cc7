"""What changes a model's fingerprint, and what does not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build_model
from torch import nn
from transformers import PreTrainedModel

from tierkv.model.fingerprint import model_fingerprint


@pytest.fixture
def model() -> PreTrainedModel:
    return build_model(FAMILIES["llama"]())


def _fingerprint(model: nn.Module, dtype: str = "float32") -> bytes:
    return model_fingerprint(model, model.config, dtype)


def test_same_model_same_fingerprint(model: PreTrainedModel) -> None:
    again = build_model(FAMILIES["llama"]())
    again.config._name_or_path = "/somewhere/else"
    again.set_attn_implementation("eager")
    assert len(_fingerprint(model)) == 16
    assert _fingerprint(model) == _fingerprint(again)


def test_every_weight_counts(model: PreTrainedModel) -> None:
    seen = {_fingerprint(model)}
    weights = dict(model.named_parameters())
    for weight in weights.values():
        with torch.no_grad():
            weight.view(-1)[weight.numel() // 2] += 1e-3
        seen.add(_fingerprint(model))
    assert len(seen) == 1 + len(weights)


def test_moving_values_within_a_weight_counts(model: PreTrainedModel) -> None:
    before = _fingerprint(model)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, dims=0))
    assert _fingerprint(model) != before


def test_dtype_rope_and_quantisation_count(model: PreTrainedModel) -> None:
    seen = {_fingerprint(model), _fingerprint(model, "bfloat16")}
    model.config.rope_parameters["rope_theta"] = 5e5
    seen.add(_fingerprint(model))
    model.config.quantization_config = {"bits": 4}
    seen.add(_fingerprint(model))
    assert len(seen) == 4


def test_weights_at_odd_addresses() -> None:
    base = torch.arange(2 * 4096 + 3, dtype=torch.float16)
    aligned, shifted = nn.Module(), nn.Module()
    aligned.weight = nn.Parameter(base[1:-1].clone())
    shifted.weight = nn.Parameter(base[1:-1])
    config = FAMILIES["llama"]()
    assert model_fingerprint(aligned, config, "x") == model_fingerprint(shifted, config, "x")
