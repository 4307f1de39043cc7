"""Fused sibling projections compute what the siblings did, once per input."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from model_steps import eager_logits, load_tiny, make_runner, random_texts, run_chunked
from tiny_models import VOCAB_SIZE, save_model
from torch import nn

from tierkv.model.fuse import FusedGroup, FusedLinear, fuse_projections


class Attention(nn.Module):
    """Three siblings and one that is none."""

    def __init__(self, biases: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 24, bias=biases[0])
        self.k_proj = nn.Linear(12, 8, bias=biases[1])
        self.v_proj = nn.Linear(12, 8, bias=biases[2])
        self.o_proj = nn.Linear(24, 12)


def _group(module: Attention) -> FusedGroup:
    assert isinstance(module.q_proj, FusedLinear)
    return module.q_proj.group  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_sibling_gives_its_own_product(has_bias: bool) -> None:
    module = Attention((has_bias,) * 3)
    x = torch.randn(1, 5, 12)
    expected = [layer(x) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    assert fuse_projections(module) == 1
    for order in ((0, 1, 2), (2, 0, 1), (0, 0, 1, 2, 2)):
        for index in order:
            layer = (module.q_proj, module.k_proj, module.v_proj)[index]
            torch.testing.assert_close(layer(x), expected[index], rtol=0, atol=1e-6)


@torch.no_grad()
def test_one_product_for_one_input_and_nothing_is_kept() -> None:
    module = Attention()
    fuse_projections(module)
    calls: list[int] = []
    _group(module).linear.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(1, 5, 12), torch.randn(1, 5, 12)
    for value in (y, x):
        _ = module.q_proj(value), module.k_proj(value), module.v_proj(value)
    assert len(calls) == 2
    assert _group(module).num_waiting == 0
    gone = weakref.ref(x)
    del x, value
    assert gone() is None


@torch.no_grad()
def test_siblings_with_different_inputs() -> None:
    plain, fused = Attention(), Attention()
    fused.load_state_dict(plain.state_dict())
    fuse_projections(fused)
    x, y = torch.randn(2, 12), torch.randn(2, 12)
    for name, value in (("q_proj", x), ("k_proj", y), ("v_proj", x), ("k_proj", x)):
        found, want = getattr(fused, name)(value), getattr(plain, name)(value)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def test_what_is_left_alone() -> None:
    mixed, hooked, wide = Attention((True, False, True)), Attention(), Attention()
    hooked.k_proj.register_forward_hook(lambda *_: None)
    wide.v_proj = nn.Linear(13, 8)
    for module in (mixed, hooked, wide):
        assert fuse_projections(module) == 0
        assert type(module.q_proj) is nn.Linear


def test_weights_are_held_once() -> None:
    module = Attention()
    before = sum(weight.numel() for weight in module.parameters())
    fuse_projections(module)
    assert sum(weight.numel() for weight in module.parameters()) == before


@pytest.mark.parametrize(
    ("family", "per_layer"), [("llama", 2), ("opt", 1), ("qwen2", 2), ("gemma2", 2), ("phi", 1)]
)
def test_logits_stay_exact(family: str, per_layer: int, tmp_path: Path) -> None:
    loaded = load_tiny(save_model(family, tmp_path))
    texts = random_texts((31, 12), VOCAB_SIZE)
    expected = [eager_logits(loaded, text) for text in texts]
    assert fuse_projections(loaded.model) == per_layer * len(loaded.layers)
    found = run_chunked(make_runner(loaded, 16, 8), texts, max_chunk=16)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
