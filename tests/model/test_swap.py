"""Norms, MLPs and rotary embedding by kernels: swapped only where they compute the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_steps import load_tiny, make_runner, random_texts, run_chunked
from tiny_models import VOCAB_SIZE, save_model
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tierkv.kernels import ops
from tierkv.model import loader
from tierkv.model.fuse import fuse_projections
from tierkv.model.swap import GatedMlp, RmsNorm, swap_modules

HALF = torch.bfloat16


class RoundLateRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * normed).to(hidden_states.dtype)


class LateEpsilonRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        root = wide.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return self.weight * (wide / root).to(hidden_states.dtype)


class FailingRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise KeyError("not today")


class ClampedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


class AddingMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def _norm(kind: type[nn.Module]) -> nn.Module:
    norm = kind(96, eps=1e-5)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    return norm.to(HALF)


def _mlp(kind: type[nn.Module] = LlamaMLP, activation: str = "silu") -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 100}
    return kind(SimpleNamespace(**sizes, mlp_bias=True, hidden_act=activation)).to(HALF)


def _swapped(module: nn.Module) -> nn.Module:
    """What becomes of a module inside a model."""
    model = nn.Sequential(module).eval().requires_grad_(False)
    fuse_projections(model)
    swap_modules(model, HALF)
    return model[0]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, RoundLateRMSNorm])
@torch.no_grad()
def test_norms(kind: type[nn.Module]) -> None:
    norm = _norm(kind)
    found, x = _swapped(norm), torch.randn(2, 50, 96).to(HALF)
    assert isinstance(found, RmsNorm) and found.weight is norm.weight
    assert float((found(x) == norm(x)).float().mean()) > 0.99


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_mlps(activation: str) -> None:
    mlp, x = _mlp(activation=activation), torch.randn(1, 20, 64).to(HALF)
    wanted = mlp(x)
    found = _swapped(mlp)
    assert isinstance(found, GatedMlp)
    torch.testing.assert_close(found(x), wanted, rtol=2e-2, atol=4e-3)


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: _norm(LateEpsilonRMSNorm),
        lambda: _norm(FailingRMSNorm),
        lambda: _hooked(_norm(LlamaRMSNorm)),
        lambda: nn.LayerNorm(96).to(HALF),
        lambda: nn.RMSNorm(96),
        lambda: _mlp(ClampedMLP),
        lambda: _mlp(AddingMLP),
        lambda: _mlp(activation="relu"),
        lambda: _hooked(_mlp()),
    ],
)
def test_what_is_left_alone(make) -> None:
    module = make()
    assert _swapped(module) is module


@pytest.mark.parametrize(
    ("family", "per_layer", "has_rotary"),
    [("llama", 3, True), ("qwen3", 5, True), ("gemma2", 5, True), ("opt", 0, False)],
)
def test_models(
    family: str, per_layer: int, has_rotary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ops.get_backend() != "native":
        pytest.skip("no C compiler")
    directory = save_model(family, tmp_path)
    fast = load_tiny(directory, dtype="bfloat16")
    monkeypatch.setattr(loader, "swap_modules", lambda model, dtype: 0)
    monkeypatch.setattr(loader, "swap_rotary", lambda model, dtype, device: 0)
    plain = load_tiny(directory, dtype="bfloat16")
    swapped = [m for m in fast.model.modules() if isinstance(m, RmsNorm | GatedMlp)]
    turned = [m for m in fast.model.modules() if "forward" in vars(m)]
    assert len(swapped) == per_layer * len(fast.layers) + bool(per_layer)  # and the last norm
    assert len(turned) == has_rotary * len(fast.layers)
    assert not any("forward" in vars(m) for m in plain.model.modules())
    texts = random_texts((31, 12), VOCAB_SIZE)
    found, wanted = (run_chunked(make_runner(x, 16, 8), texts, max_chunk=16) for x in (fast, plain))
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).square().mean().sqrt() / want.std()) < 0.03
