"""Launches attention: the decode rows and the chunks of a step, each with tiles of their own.

A step's sequences with one new row (decode) and those with more (prefill chunks, drafts) are two
launches: a single token has no use for the 128-row tiles that chunks want, and only decode has to
be free of host work, so that it can be captured in a graph. Which tile is which sequence's is
worked out once per step and kept in its `plans`; a step of decode rows only needs no such list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tierkv.kernels.metadata import AttentionMetadata
from tierkv.kernels.triton import tiles
from tierkv.kernels.triton.attend import attend
from tierkv.kernels.triton.merge import merge_parts
from tierkv.kernels.triton.tiles import AttendShape, Device, KvShape, Tile

_LOG2E = 1.4426950408889634
_CHUNK = 8  # parts whose values `merge_parts` loads at once


def attention(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    out: Tensor,
    lse: Tensor | None,
    device: Device,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Fill out, and lse if given, with the attention of every row; see `ops.paged_attention`.

    The number of parts that contexts are cut into follows from the block tables' width: in a
    captured graph it is that of the longest context the tables can hold.

    Raises:
        ValueError: head_dim is over 256.
    """
    if kv.shape[4] > tiles.MAX_HEAD_DIM:
        raise ValueError(
            f"kv has head_dim {kv.shape[4]}; on a GPU the most is {tiles.MAX_HEAD_DIM}"
        )
    problem = _Problem(q, kv, meta, out, lse, device, scale, window, softcap, sinks)
    if meta.num_tokens == meta.num_seqs:
        problem.decode(None)
        return
    chunks, single = step_tiles(meta, problem.chunk_shape().tokens)
    problem.prefill(chunks)
    if single.shape[0]:
        problem.decode(single)


def step_tiles(meta: AttentionMetadata, tokens: int) -> tuple[Tensor, Tensor]:
    """Tiles of a step with chunks, as int32 `[n, 2]`: the sequence, and the first token in it.

    The chunks' come first, cut into tiles of `tokens`, those with most keys in front; then the
    single rows'.
    """
    found: tuple[Tensor, Tensor] | None = meta.plans.get(("triton", tokens))
    if found is not None:
        return found
    chunks, single = [], []
    for seq, query_len in enumerate(meta.query_len_list):
        if query_len == 1:
            single.append((seq, 0))
            continue
        start = meta.context_len_list[seq] - query_len
        chunks += [(start + first, seq, first) for first in range(0, query_len, tokens)]
    chunks.sort(reverse=True)
    pairs = torch.tensor([chunk[1:] for chunk in chunks] + single, dtype=torch.int32)
    if meta.query_start.is_cuda:
        pairs = pairs.pin_memory().to(meta.query_start.device, non_blocking=True)
    found = meta.plans[("triton", tokens)] = pairs[: len(chunks)], pairs[len(chunks) :]
    return found


@dataclass(frozen=True, slots=True)
class _Problem:
    """The arguments of `attention`."""

    q: Tensor
    kv: Tensor
    meta: AttentionMetadata
    out: Tensor
    lse: Tensor | None
    device: Device
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.kv.shape[2]

    @property
    def kv_shape(self) -> KvShape:
        """The blocks."""
        return KvShape(*self.kv.shape[2:])

    def chunk_tile(self) -> Tile:
        """The tile of runs of rows."""
        return tiles.prefill_tile(self.kv_shape, self.group, self.q.dtype, self.device)

    def chunk_shape(self) -> AttendShape:
        """What is compiled for them."""
        return self._shape(self.chunk_tile(), is_decode=False)

    def prefill(self, pairs: Tensor) -> None:
        """Attention of the chunks' tiles."""
        self._launch(self.chunk_tile(), self.chunk_shape(), pairs, pairs.shape[0])

    def decode(self, pairs: Tensor | None) -> None:
        """Attention of the single rows, or if None of all sequences, which have one each."""
        tile = tiles.decode_tile(self.kv_shape, self.group, self.q.dtype, self.device)
        num_rows = self.meta.num_seqs if pairs is None else pairs.shape[0]
        self._launch(tile, self._shape(tile, is_decode=True), pairs, num_rows)

    def _shape(self, tile: Tile, *, is_decode: bool) -> AttendShape:
        return tiles.attend_shape(
            tile,
            self.kv_shape,
            self.group,
            is_decode=is_decode,
            has_window=self.window is not None,
            has_softcap=self.softcap is not None,
        )

    def _launch(self, tile: Tile, shape: AttendShape, pairs: Tensor | None, num_tiles: int) -> None:
        """Attend, and merge what was cut into parts."""
        num_programs = num_tiles * shape.num_kv_heads * shape.head_tiles
        num_parts = tiles.count_parts(num_programs, self._max_keys(shape), self.device, shape)
        if num_parts == 1:
            self._attend(tile, shape, pairs, num_tiles, 1, self.out, self.lse, self.sinks)
            return
        shape = replace(shape, is_split=True)
        places = (num_parts, num_tiles * shape.tokens, shape.num_heads)
        parts = self.q.new_empty((*places, shape.head_dim), dtype=torch.float32)
        lses = self.q.new_empty(places, dtype=torch.float32)
        self._attend(tile, shape, pairs, num_tiles, num_parts, parts, lses, None)
        merge_parts[places[1:]](
            parts, lses, self.out, self.lse, self.sinks, self.meta.query_start, pairs, num_parts,
            shape.merged(), _CHUNK, num_warps=1,
        )  # fmt: skip

    def _max_keys(self, shape: AttendShape) -> int:
        """A bound of what one tile sees, known without reading a length."""
        most = self.meta.block_tables.shape[1] * self.meta.block_size
        return most if self.window is None else min(most, self.window + shape.tokens)

    def _attend(
        self,
        tile: Tile,
        shape: AttendShape,
        pairs: Tensor | None,
        num_tiles: int,
        num_parts: int,
        out: Tensor,
        lse: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        meta, cap = self.meta, self.softcap
        grid = (num_tiles, shape.num_kv_heads * shape.head_tiles, num_parts)
        attend[grid](
            self.q, self.kv, out, lse, sinks,
            meta.query_start, meta.context_lens, meta.key_start, meta.key_lens, meta.block_tables,
            pairs, self.q.stride(0), self.q.stride(1), self.kv.stride(0),
            meta.block_tables.stride(0), self.window or 0,
            _LOG2E * self.scale if cap is None else 1.0,
            0.0 if cap is None else 2 * _LOG2E * self.scale / cap,
            0.0 if cap is None else _LOG2E * cap,
            shape, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
