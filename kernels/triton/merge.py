"""Merging partial attention: over the parts of a context, and over segments kept elsewhere.

    lse = log(sum_i exp(lse_i)),   out = sum_i exp(lse_i - lse) out_i

A part that saw no key has lse -inf and counts for nothing; its out is not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.triton.tiles import power_of_two

_LOG2E = tl.constexpr(1.4426950408889634)
_ELEMENTS = 2048  # that a program merges


@triton.jit
def weigh(lse, highest):
    """`exp(lse - highest)`; 0 where lse is -inf, also if nothing is higher."""
    return tl.exp2((lse - tl.where(highest == float("-inf"), 0.0, highest)) * _LOG2E)


@triton.jit(
    do_not_specialize=["num_parts"],
    do_not_specialize_on_alignment=["lse", "sinks", "query_start", "tiles"],
)
def merge_parts(
    parts, part_lses, out, lse, sinks, query_start, tiles, num_parts,
    S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge what `attend` made of a split context; grid (tiles * tokens, num_heads).

    parts fp32 `[num_parts, tiles * tokens, num_heads, head_dim]` and part_lses without the last
    dimension, `CHUNK` of them at a time; out, lse, sinks, query_start, tiles as in `attend`.
    """
    place, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, is_row = row_of(place, query_start, tiles, S)
    if is_row:
        stride = tl.num_programs(0).to(tl.int64) * S.num_heads
        source = place * S.num_heads + head
        dims = tl.arange(0, S.block_d)
        acc = tl.full([S.block_d], 0.0, tl.float32)
        total = 0.0
        highest = float("-inf")
        for start in range(0, num_parts, CHUNK):
            part = start + tl.arange(0, CHUNK)
            places = source + part * stride
            known = tl.load(part_lses + places, mask=part < num_parts, other=float("-inf"))
            mask = (known > float("-inf"))[:, None] & (dims < S.head_dim)[None, :]
            values = tl.load(parts + places[:, None] * S.head_dim + dims[None, :], mask, other=0.0)
            higher = tl.maximum(highest, tl.max(known))
            weights = weigh(known, higher)
            kept = weigh(highest, higher)
            total = total * kept + tl.sum(weights)
            acc = acc * kept + tl.sum(values * weights[:, None], 0)
            highest = higher
        total = tl.where(total > 0, total, 1.0)  # where no part saw anything, highest is -inf
        target = row * S.num_heads + head
        if lse is not None:
            tl.store(lse + target, highest + tl.log(total))
        if sinks is not None:
            total += weigh(tl.load(sinks + head), highest)
        acc = acc / total
        tl.store(out + target * S.head_dim + dims, acc.to(out.dtype.element_ty), dims < S.head_dim)


@triton.jit
def row_of(place, query_start, tiles, S: tl.constexpr):
    """The row that a tile's token is, and whether the tile has so many."""
    if tiles is None:
        return tl.load(query_start + place), True
    else:
        seq = tl.load(tiles + place // S.tokens * 2)
        token = tl.load(tiles + place // S.tokens * 2 + 1) + place % S.tokens
        row = tl.load(query_start + seq) + token
        return row, row < tl.load(query_start + seq + 1)


@triton.jit
def merge_segment(
    out, lse, segment, segment_lse, sinks, num_rows,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge one more segment, and the sinks, into fp32 out `[num_rows, DIM]`, lse `[num_rows]`.

    A row is a head of a token. segment (any float dtype) with its lse, and sinks, may be None.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    is_row = row < num_rows
    places = row[:, None] * DIM + dims[None, :]
    mask = is_row[:, None] & (dims < DIM)[None, :]
    known = tl.load(lse + row, mask=is_row, other=float("-inf"))
    highest = known
    if segment is not None:
        more = tl.load(segment_lse + row, mask=is_row, other=float("-inf"))
        highest = tl.maximum(highest, more)
    if sinks is not None:
        sink = tl.load(sinks + row % NUM_HEADS, mask=is_row, other=0.0)
        highest = tl.maximum(highest, sink)
    weight = weigh(known, highest)
    total = weight
    acc = tl.load(out + places, mask=mask, other=0.0) * weight[:, None]
    if segment is not None:
        weight = weigh(more, highest)
        total += weight
        acc += tl.load(segment + places, mask=mask, other=0.0).to(tl.float32) * weight[:, None]
    if sinks is not None:
        total += weigh(sink, highest)
    total = tl.where(total > 0, total, 1.0)
    tl.store(out + places, acc / total[:, None], mask)
    tl.store(lse + row, highest + tl.log(total), is_row)


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ops.merge_attention`; a launch for each segment after the first."""
    out = outs[0].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    lse = lses[0].clone(memory_format=torch.contiguous_format)
    segments: list[tuple[Tensor | None, Tensor | None]]
    segments = [*zip(outs[1:], lses[1:], strict=True)]
    if sinks is not None and not segments:
        segments = [(None, None)]
    for index, segment in enumerate(segments):
        _merge_into(out, lse, *segment, sinks if index == len(segments) - 1 else None)
    return out, lse


def _merge_into(
    out: Tensor, lse: Tensor, part: Tensor | None, part_lse: Tensor | None, sinks: Tensor | None
) -> None:
    num_tokens, num_heads, dim = out.shape
    block_d = power_of_two(dim)
    block_r = max(1, _ELEMENTS // block_d)
    if num_tokens:
        merge_segment[(triton.cdiv(num_tokens * num_heads, block_r),)](
            out, lse, None if part is None else part.contiguous(),
            None if part_lse is None else part_lse.contiguous(),
            sinks, num_tokens * num_heads, num_heads, dim, block_r, block_d,
        )  # fmt: skip
