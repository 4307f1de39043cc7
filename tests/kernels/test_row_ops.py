"""RMS norm, gated activations and rotary embedding against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tierkv.kernels import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [1, 7, 16, 33, 100, 768]
ROWS = [1, 5, 300]


def check(found: Tensor, wanted: Tensor) -> None:
    """Equal but for a last bit, which two roundings in a row can make two."""
    assert found.dtype == wanted.dtype
    step = 2 * torch.finfo(wanted.dtype).eps
    rtol = max(step, 1e-5)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=rtol, atol=4e-6)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("round_first", [True, False])
def test_rms_norm(dtype, round_first, backend, rng, threads) -> None:
    for dim in DIMS:
        for rows in ROWS:
            x = (torch.randn(rows, dim + 3) * rng.choice([1e-3, 1, 100])).to(dtype)[:, 1 : dim + 1]
            weight = torch.randn(dim)
            found = ops.rms_norm(x, weight, 1e-5, round_first=round_first)
            assert found.is_contiguous()
            check(found, reference.rms_norm(x, weight, 1e-5, round_first=round_first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_act_and_mul(dtype, activation, backend, rng, threads) -> None:
    for dim in DIMS:
        for rows in ROWS:
            x = (2 * torch.randn(rows, 2 * dim + 3)).to(dtype)[:, 1 : 2 * dim + 1]
            found = ops.act_and_mul(x, activation)
            assert found.is_contiguous()
            check(found, reference.act_and_mul(x, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 6, 64, 80, 128])
def test_rotate(dtype, dim, backend, rng, threads) -> None:
    for tokens in ROWS:
        joint = torch.randn(tokens, 7 * dim).to(dtype)  # as fused projections make them
        q = joint[:, : 5 * dim].view(tokens, 5, dim).transpose(0, 1)
        k = joint[:, 5 * dim :].view(tokens, 2, dim).transpose(0, 1)
        cos, sin = torch.randn(2, tokens, dim).to(dtype)
        found, wanted = ops.rotate(q, k, cos, sin), reference.rotate(q, k, cos, sin)
        for got, want in zip(found, wanted, strict=True):
            if dtype is torch.float32:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(6,), (1, 3, 6), (2, 3, 6), (0, 6)])
def test_any_leading_dimensions_and_strides(shape, backend, rng) -> None:
    weight = torch.randn(6)
    plain = torch.randn(shape).bfloat16()
    strided = torch.stack((plain, plain), -1)[..., 0]
    for x in (plain, strided):
        check(
            ops.rms_norm(x, weight, 1e-6, round_first=True),
            reference.rms_norm(x, weight, 1e-6, round_first=True),
        )
        check(ops.act_and_mul(x, "silu"), reference.act_and_mul(x, "silu"))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values(activation, dtype, backend) -> None:
    gate = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, torch.nan, -90.0, 90.0], dtype=dtype)
    x = torch.cat((gate, torch.ones_like(gate)))
    found, wanted = ops.act_and_mul(x, activation), reference.act_and_mul(x, activation)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-6, equal_nan=True)


X, W = torch.zeros(2, 6), torch.zeros(6)
HEADS, TABLE = torch.zeros(4, 2, 6), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.rms_norm(X.long(), W, 1.0, round_first=True), TypeError, "x has dtype"),
        (lambda: ops.rms_norm(X.to("meta"), W, 1.0, round_first=True), ValueError, "x is on meta"),
        (lambda: ops.rms_norm(X, W[:5], 1.0, round_first=True), ValueError, "weight has shape"),
        (lambda: ops.rms_norm(X, W.bfloat16(), 1.0, round_first=True), TypeError, "weight has"),
        (lambda: ops.rms_norm(X[:, :0], W[:0], 1.0, round_first=True), ValueError, "x must have"),
        (lambda: ops.act_and_mul(X[:, :5], "silu"), ValueError, "even"),
        (lambda: ops.act_and_mul(X, "relu"), ValueError, "activation 'relu'"),
        (lambda: ops.rotate(HEADS[..., :5], HEADS, TABLE, TABLE), ValueError, "q and k must be"),
        (lambda: ops.rotate(HEADS, HEADS[:, :1], TABLE, TABLE), ValueError, "k has shape"),
        (lambda: ops.rotate(HEADS, HEADS, TABLE[:1], TABLE), ValueError, "cos has shape"),
        (lambda: ops.rotate(HEADS, HEADS, TABLE, TABLE.half()), TypeError, "sin has dtype"),
    ],
)
def test_wrong_arguments_are_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
