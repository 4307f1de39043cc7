"""Norms, gated activations and rotations by Triton's kernels; see `triton_steps`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_steps import DEVICE, on_device

from tierkv.kernels import cpu_torch, reference
from tierkv.kernels.triton import rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(
    found: Tensor, wanted: Tensor, scale: Tensor | float = 0.0, noise: Tensor | float = 1e-6
) -> None:
    """The same but for rare last bits; Triton's interpreter cuts bf16 off instead of rounding.

    Args:
        found, wanted: of one shape.
        scale: size of what was added up.
        noise: what fp32 itself leaves open.
    """
    assert found.shape == wanted.shape and found.dtype is wanted.dtype
    difference = (found.cpu().float() - wanted.float()).abs()
    is_cut = wanted.dtype is torch.bfloat16 and DEVICE == "cpu"
    ulps = torch.finfo(wanted.dtype).eps * (wanted.float().abs() + scale)
    assert bool((difference <= (4 if is_cut else 2) * ulps + noise).all())
    if wanted.dtype is not torch.float32 and not is_cut:
        assert float((difference <= noise).float().mean()) > 0.98


def spread(num_rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of ordinary, tiny and large size."""
    sizes = torch.tensor([1.0, 1e-3, 50.0])[torch.randint(0, 3, (num_rows, 1))]
    return (torch.randn(num_rows, dim) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 768, 5000])
@pytest.mark.parametrize("round_first", [True, False])
def test_rms_norm(dtype, dim, round_first, rng) -> None:
    x, weight = spread(rng.randint(1, 40), dim, dtype), torch.randn(dim)
    found = rows.rms_norm(on_device(x), weight.to(DEVICE), 1e-5, round_first)
    check(found, cpu_torch.rms_norm(x, weight, 1e-5, round_first))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 48, 1024, 1500])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_act_and_mul(dtype, dim, activation, rng) -> None:
    x = spread(rng.randint(1, 9), 2 * dim, dtype)
    gate, up = x.float().chunk(2, -1)
    noise = 1e-6 * (1 + (gate * up).abs())  # the oracle's 1 + tanh(x), where x is far below zero
    found = rows.act_and_mul(on_device(x), activation)
    check(found, cpu_torch.act_and_mul(x, activation), noise=noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (12, 4), (71, 1), (8, 8)])
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_rotate(dtype, heads, kv_heads, dim, rng) -> None:
    """From one joint product, as the layers have it."""
    tokens = rng.randint(1, 9)
    joint = torch.randn(tokens, (heads + kv_heads) * dim + 16).to(dtype)
    q = joint[:, : heads * dim].view(tokens, heads, dim).transpose(0, 1)
    k = joint[:, heads * dim : -16].view(tokens, kv_heads, dim).transpose(0, 1)
    cos, sin = torch.randn(2, tokens, dim).to(dtype)
    wanted = reference.rotate(q, k, cos, sin)
    results = rows.rotate(*(on_device(x) for x in (q, k, cos, sin)))
    for found, turned, x in zip(results, wanted, (q, k), strict=True):
        swapped = torch.cat([x[..., dim // 2 :], x[..., : dim // 2]], -1)
        size = (x * cos).float().abs() + (swapped * sin).float().abs()
        check(found, turned, size)
        if dtype is torch.float16 or (DEVICE == "cuda" and dtype is torch.bfloat16):
            assert torch.equal(found.cpu(), turned)


def test_any_strides_and_leading_dimensions() -> None:
    x = torch.randn(3, 4, 64, 2)[..., 0]
    weight = torch.randn(64)
    norm = rows.rms_norm(on_device(x), weight.to(DEVICE), 1e-6, True)
    check(norm, cpu_torch.rms_norm(x, weight, 1e-6, True))
    strided = torch.randn(1, 5, 96)[..., :64]
    check(rows.act_and_mul(on_device(strided), "silu"), cpu_torch.act_and_mul(strided, "silu"))
    q, cos = torch.randn(16, 2, 3).permute(1, 2, 0), torch.randn(16, 3).T
    found = rows.rotate(on_device(q), on_device(q), on_device(cos), on_device(cos))
    check(found[1], reference.rotate(q, q, cos, cos)[1], 10.0)


def test_no_rows() -> None:
    empty = torch.empty(0, 64, device=DEVICE)
    assert rows.rms_norm(empty, torch.ones(64, device=DEVICE), 1e-6, True).shape == (0, 64)
    assert rows.act_and_mul(empty, "silu").shape == (0, 32)
    heads = empty.view(2, 0, 64)
    assert rows.rotate(heads, heads, empty, empty)[0].shape == (2, 0, 64)
