"""Copies: new keys and values into their blocks, and rows of bytes from one table to another.

Rows are copied by a bounded number of programs that loop: a copy that shares the GPU with a
forward pass, or whose other side is host memory behind a bus, is best left to a few of them.
Every access is 16 bytes wide where rows and their distances are multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.triton.tiles import power_of_two

_HEADS = 16  # of one token, written by one program
_CHUNK = 4096  # words that a program copies in one turn: 32 KiB, 128 bytes per thread
_NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_slots"])
def store_tokens(
    kv, k, v, slot_mapping, num_slots, kv_block,
    k_row, k_head, k_dim, v_row, v_head, v_dim,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token's keys and values of `BLOCK_H` heads into its slot; grid (tokens, heads)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if (slot >= 0) & (slot < num_slots):
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
        dim = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
        mask = (head < NUM_HEADS) & (dim < DIM)
        place = slot // BLOCK_SIZE * kv_block + slot % BLOCK_SIZE * DIM
        target = kv + place + head * (BLOCK_SIZE * DIM) + dim
        key = tl.load(k + token * k_row + head * k_head + dim * k_dim, mask=mask)
        value = tl.load(v + token * v_row + head * v_head + dim * v_dim, mask=mask)
        tl.store(target, key, mask=mask)
        tl.store(target + NUM_HEADS * BLOCK_SIZE * DIM, value, mask=mask)


def write_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `ops.write_kv`; a slot outside kv drops the row, as a negative one does."""
    num_tokens = slot_mapping.shape[0]
    if not num_tokens:
        return
    num_blocks, _, num_heads, block_size, dim = kv.shape
    block_h = min(_HEADS, power_of_two(num_heads, 1))
    store_tokens[(num_tokens, triton.cdiv(num_heads, block_h))](
        kv, k, v, slot_mapping.contiguous(), num_blocks * block_size, kv.stride(0),
        *k.stride(), *v.stride(), num_heads, dim, block_size, block_h, power_of_two(dim),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def copy_words(
    source, source_ids, target, target_ids, num_rows, source_stride, target_stride,
    WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy rows of `WORDS` words, whichever; ids may be None for rows 0, 1, ...; grid: any."""
    CHUNKS: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    first = tl.program_id(0).to(tl.int64)  # what counts in 64 bits, the offsets do too
    for unit in range(first, num_rows.to(tl.int64) * CHUNKS, tl.num_programs(0)):
        row = unit // CHUNKS
        begin = row if source_ids is None else tl.load(source_ids + row)
        end = row if target_ids is None else tl.load(target_ids + row)
        word = unit % CHUNKS * CHUNK + tl.arange(0, CHUNK)
        content = tl.load(source + begin * source_stride + word, mask=word < WORDS)
        tl.store(target + end * target_stride + word, content, mask=word < WORDS)


def copy_rows(
    source: Tensor,
    source_ids: Tensor | None,
    target: Tensor,
    target_ids: Tensor | None,
    num_rows: int,
    num_programs: int,
) -> None:
    """Row `target_ids[i]` of target becomes row `source_ids[i]` of source, for `i < num_rows`.

    Args:
        source, target: uint8 `[rows, num_bytes]`, contiguous inside a row; memory that the GPU
            reaches, also the host's if it is pinned.
        source_ids, target_ids: int64 `[num_rows]` on the GPU, or None for `i` itself.
        num_rows: rows to copy.
        num_programs: thread blocks that may run, at least 1.
    """
    words, others = (_as_words(x, _word(source, target)) for x in (source, target))
    num_words = words.shape[1]
    if not num_rows or not num_words:
        return
    chunk = min(_CHUNK, power_of_two(num_words, 128))
    grid = (min(num_programs, num_rows * triton.cdiv(num_words, chunk)),)
    copy_words[grid](
        words, source_ids, others, target_ids, num_rows, words.stride(0), others.stride(0),
        num_words, chunk, num_warps=_NUM_WARPS,
    )  # fmt: skip


def _word(*tables: Tensor) -> torch.dtype:
    """The widest type of which the rows, their distances and their addresses are multiples."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        sizes = (n for x in tables for n in (x.shape[1], x.stride(0), x.data_ptr()))
        if all(size % dtype.itemsize == 0 for size in sizes):
            return dtype
    return torch.uint8


def _as_words(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table's rows as words; a view."""
    if table.shape[0] == 1:  # the distance of a single row is arbitrary, and views look at it
        return table.reshape(-1).view(dtype)[None]
    return table.view(dtype)
