"""Packed linear layers against `torch.nn.functional.linear`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tierkv.kernels import linear as packed_linear
from tierkv.kernels.linear import PackedLinear, can_pack, pack_linears

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A dtype that can be packed here."""
    if not can_pack("cpu", request.param):
        pytest.skip(f"{request.param} cannot be packed on this CPU")
    return request.param


class Tied(nn.Module):
    """An embedding, a layer used twice, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 32)
        self.again = self.first
        self.layers = nn.ModuleList([nn.Linear(32, 48), nn.Linear(48, 32, bias=False)])
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.again(self.first(self.embed(ids)))
        return self.head(self.layers[1](self.layers[0](x).relu()))


@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (2, 5, 40), (1, 200, 40), (40,), (0, 40)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_agrees_with_linear(shape, bias, dtype, rng) -> None:
    plain = nn.Linear(40, 72, bias=bias).to(dtype)
    layer = PackedLinear(plain)
    x = torch.randn(shape).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x), plain(x), atol=limit, rtol=limit)


@torch.inference_mode()
def test_takes_strided_input(dtype, rng) -> None:
    plain = nn.Linear(40, 72).to(dtype)
    x = torch.randn(40, 6).to(dtype).T
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(PackedLinear(plain)(x), plain(x), atol=limit, rtol=limit)


def test_the_weight_answers_questions(dtype) -> None:
    plain = nn.Linear(40, 72).to(dtype)
    weight = PackedLinear(plain).weight
    assert weight.dtype == dtype and weight.shape == (72, 40) and weight.device.type == "cpu"
    assert torch.equal(weight.to_dense(), plain.weight)
    with pytest.raises(RuntimeError):
        functional.linear(torch.zeros(1, 40, dtype=dtype), weight + 1)


@torch.inference_mode()
def test_packs_a_model(dtype, rng) -> None:
    model = Tied().to(dtype).eval()
    ids = torch.arange(7)
    wanted = model(ids)
    assert pack_linears(model) == 4
    assert model.first is model.again and type(model.first) is PackedLinear
    assert type(model.head) is PackedLinear and model.embed.weight.shape == (50, 32)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(model(ids), wanted, atol=limit, rtol=limit)
    assert pack_linears(model) == 0


def test_leaves_special_layers_alone(dtype) -> None:
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(Special(16, 16), hooked, nn.Linear(16, 16).to(torch.float64)).to("cpu")
    assert pack_linears(model) == 0


def test_frees_the_plain_weight(dtype) -> None:
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype)
    weights = [weakref.ref(layer.weight) for layer in model]
    pack_linears(model)
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_what_cannot_be_packed(monkeypatch) -> None:
    assert not can_pack("cuda", torch.bfloat16)
    assert not can_pack("cpu", torch.float64)
    monkeypatch.setattr(packed_linear.platform, "machine", lambda: "riscv64")
    assert not can_pack("cpu", torch.float32)
