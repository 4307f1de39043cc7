"""The probe accepts what it should, refuses what computes something else, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_steps import load_tiny
from tiny_models import save_model

from tierkv.errors import UnsupportedModelError
from tierkv.model import loader
from tierkv.model import probe as probe_module
from tierkv.model.loaded import LoadedModel
from tierkv.model.probe import probe, verify_model


@pytest.fixture
def _plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading probes before it fuses and packs weights; these tests probe after loading."""
    monkeypatch.setattr(loader, "pack_linears", lambda model: 0)
    monkeypatch.setattr(loader, "fuse_projections", lambda model: 0)


@pytest.mark.usefixtures("_plain_weights")
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "qwen2-moe", "gpt-oss", "stablelm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_served_families_pass(family: str, dtype: str, tmp_path: Path) -> None:
    loaded = load_tiny(save_model(family, tmp_path), dtype=dtype)
    result = verify_model(loaded)
    assert 0 < result.difference < result.limit / 20
    assert result.limit == probe_module.MAX_FLOAT32_DIFFERENCE


def test_packed_weights_are_probed_as_they_are(tmp_path: Path) -> None:
    result = verify_model(load_tiny(save_model("llama", tmp_path), dtype="bfloat16"))
    assert 1e-4 < result.difference < result.limit / 2


@pytest.mark.usefixtures("_plain_weights")
def test_large_half_precision_models_are_probed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_FLOAT32_PARAMETERS", 0)
    loaded = load_tiny(save_model("llama", tmp_path), dtype="bfloat16")
    result = verify_model(loaded)
    assert result.limit == probe_module.MAX_HALF_DIFFERENCE
    assert 1e-4 < result.difference < result.limit / 2
    with pytest.raises(UnsupportedModelError):
        verify_model(_with_windows(loaded, 8))


@pytest.mark.usefixtures("_plain_weights")
def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    loaded = load_tiny(save_model("llama", tmp_path), dtype="bfloat16")
    before = {name: x.clone() for name, x in _state(loaded).items()}
    verify_model(loaded)
    after = _state(loaded)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert {x.dtype for x in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.config._attn_implementation == "tierkv"


def _state(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {**dict(loaded.model.named_parameters()), **dict(loaded.model.named_buffers())}


def _with_windows(loaded: LoadedModel, window: int | None) -> LoadedModel:
    layers = [replace(layer, window=window) for layer in loaded.layers]
    return replace(loaded, layers=layers)


def _token_shift(module: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """State that flows from token to token beside the KV cache, as in RWKV."""
    hidden = inputs[0]
    before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
    return hidden + 0.1 * before


def test_a_window_that_is_not_the_models_is_found(tmp_path: Path) -> None:
    loaded = load_tiny(save_model("llama", tmp_path))
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        verify_model(_with_windows(loaded, 16))


def test_a_window_off_by_one_is_found(tmp_path: Path) -> None:
    loaded = load_tiny(save_model("mistral", tmp_path))
    assert probe(loaded).is_match
    for window in (7, 9, None):
        assert not probe(_with_windows(loaded, window)).is_match


def test_state_between_tokens_is_found(tmp_path: Path) -> None:
    loaded = load_tiny(save_model("llama", tmp_path))
    loaded.model.model.layers[1].mlp.register_forward_pre_hook(_token_shift)
    with pytest.raises(UnsupportedModelError, match=r"differ.* by \d"):
        verify_model(loaded)


def test_logits_that_are_not_numbers_are_no_match(tmp_path: Path) -> None:
    loaded = load_tiny(save_model("llama", tmp_path))
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] = float("nan")
    assert not probe(loaded).is_match


@pytest.mark.usefixtures("_plain_weights")
def test_one_layer_at_a_time_is_widened(tmp_path: Path) -> None:
    model = load_tiny(save_model("llama", tmp_path), dtype="bfloat16").model
    layers = model.model.layers
    seen: list[list[torch.dtype]] = []
    for layer in layers:
        layer.mlp.register_forward_hook(
            lambda *_: seen.append([layer.mlp.down_proj.weight.dtype for layer in layers])
        )
    with torch.inference_mode(), probe_module._float32(model):
        assert model.lm_head.weight.dtype is torch.float32
        probe_module._eager(SimpleNamespace(model=model, device="cpu"), torch.arange(3))
    assert [row.count(torch.float32) for row in seen] == [1] * len(layers)
    assert all(weight.dtype is torch.bfloat16 for weight in model.parameters())
