"""The small operations between the products, one launch each: RMS norm, gated activation, rotation.

    norm     w x / sqrt(mean(x^2) + eps)
    gate     act(g) u,   act = silu(g) = g s(g),  or gelu(g) = g s(2 sqrt(2/pi) (g + 0.044715 g^3))
    rotate   x_1 cos - x_2 sin,  x_2 cos + x_1 sin,  of a head's halves x_1 and x_2

s is the logistic function; the second form is gelu with tanh. Transformers' code takes up to a
dozen launches for each. Arithmetic is fp32, rounded to the tensors' type where that code rounds, so
that the bits are the same but for rare last ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.triton.tiles import power_of_two

_ELEMENTS = 1024  # of a program, unless a row has more
_WARP_ELEMENTS = 512
_MOST_WARPS = 16
_HEADS = 8  # of one token, turned by one program


@triton.jit(do_not_specialize=["num_rows"])
def norm_rows(
    x, weight, out, num_rows, x_stride, eps,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """`BLOCK_R` rows of `[num_rows, DIM]`, `x_stride` elements apart; weight is fp32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < num_rows) & (dim < DIM)
    wide = tl.load(x + row * x_stride + dim, mask=mask, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / DIM + eps)
    if ROUND_FIRST:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + dim, mask=dim < DIM, other=0.0)
    tl.store(out + row * DIM + dim, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_rows(
    x, out, x_stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_SILU: tl.constexpr
):  # fmt: skip
    """`BLOCK_D` elements of a row's product of halves; grid (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = dim < DIM
    gate = tl.load(x + row * x_stride + dim, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + DIM + dim, mask=mask, other=0.0).to(tl.float32)
    inner = gate
    if not IS_SILU:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    small = tl.exp(-tl.abs(inner))  # never overflows
    active = gate * tl.where(inner < 0, small, 1.0) / (1.0 + small)
    active = active.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * DIM + dim, (active * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def turn_heads(
    x, out, token, heads, cos, sin, x_head, x_token,
    NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn some heads of one token; out is `[tokens, NUM_HEADS, 2 * HALF]`."""
    dtype: tl.constexpr = x.dtype.element_ty
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < NUM_HEADS) & (dim < HALF)
    source = x + token * x_token + heads * x_head + dim
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    live = dim < HALF
    cos_first = tl.load(cos + dim, mask=live, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + HALF + dim, mask=live, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + dim, mask=live, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + HALF + dim, mask=live, other=0.0).to(tl.float32)
    kept = (first * cos_first).to(dtype).to(tl.float32)
    turned = (second * sin_first).to(dtype).to(tl.float32)
    target = out + (token * NUM_HEADS + heads) * (2 * HALF) + dim
    tl.store(target, (kept - turned).to(dtype), mask=mask)
    kept = (second * cos_second).to(dtype).to(tl.float32)
    turned = (first * sin_second).to(dtype).to(tl.float32)
    tl.store(target + HALF, (kept + turned).to(dtype), mask=mask)


@triton.jit
def rotate_heads(
    q, k, q_out, k_out, cos, sin, q_head, q_token, k_head, k_token,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`BLOCK_H` heads of one token; grid (tokens, tiles of q's heads, then of k's)."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    cos += token * (2 * HALF)
    sin += token * (2 * HALF)
    lane = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    Q_TILES: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    if tile < Q_TILES:
        heads = tile * BLOCK_H + lane
        turn_heads(q, q_out, token, heads, cos, sin, q_head, q_token, NUM_HEADS, HALF, BLOCK_D)
    else:
        heads = (tile - Q_TILES) * BLOCK_H + lane
        turn_heads(k, k_out, token, heads, cos, sin, k_head, k_token, NUM_KV_HEADS, HALF, BLOCK_D)


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """See `ops.rms_norm`."""
    rows, stride = _rows(x)
    dim, out = rows.shape[1], x.new_empty(x.shape)
    block_d = power_of_two(dim)
    block_r = max(1, _ELEMENTS // block_d)
    if len(rows):
        norm_rows[(triton.cdiv(len(rows), block_r),)](
            rows, weight, out, len(rows), stride, eps, dim, block_r, block_d, round_first,
            num_warps=_num_warps(block_r * block_d),
        )  # fmt: skip
    return out


def act_and_mul(x: Tensor, activation: str) -> Tensor:
    """See `ops.act_and_mul`."""
    rows, stride = _rows(x)
    dim = rows.shape[1] // 2
    out = x.new_empty((*x.shape[:-1], dim))
    block_d = min(_ELEMENTS, power_of_two(dim))
    if len(rows):
        gate_rows[(len(rows), triton.cdiv(dim, block_d))](
            rows, out, stride, dim, block_d, activation == "silu", num_warps=_num_warps(block_d)
        )
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.rotate`; the results are views of `[num_tokens, heads, head_dim]`."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    num_heads, num_tokens, dim = q.shape
    (q_head, q_token, _), (k_head, k_token, _) = q.stride(), k.stride()
    if num_tokens == 1:  # the distance of a single token is arbitrary
        q_token = k_token = dim
    q_out, k_out = (x.new_empty((num_tokens, x.shape[0], dim)) for x in (q, k))
    num_tiles = triton.cdiv(num_heads, _HEADS) + triton.cdiv(k.shape[0], _HEADS)
    block_d = power_of_two(dim // 2)
    if num_tokens:
        rotate_heads[(num_tokens, num_tiles)](
            q, k, q_out, k_out, cos, sin, q_head, q_token, k_head, k_token,
            num_heads, k.shape[0], dim // 2, _HEADS, block_d,
            num_warps=_num_warps(_HEADS * block_d),
        )  # fmt: skip
    return q_out.transpose(0, 1), k_out.transpose(0, 1)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as `[rows, dim]`, contiguous inside a row, and the elements from one row to the next."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    # The distance of a single row is arbitrary, and what is arbitrary is compiled again.
    return rows, rows.stride(0) if len(rows) > 1 else rows.shape[1]


def _num_warps(num_elements: int) -> int:
    return min(_MOST_WARPS, max(1, num_elements // _WARP_ELEMENTS))
