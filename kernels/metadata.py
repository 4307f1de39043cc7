"""What one step's attention needs to know, built once and shared by every layer.

A step packs the new tokens ("rows") of all its sequences into one `[num_tokens, ...]` tensor.
Sequence `s` owns rows `query_start[s] .. query_start[s + 1] - 1`; its row `i` is the token at
absolute position `context_len - query_len + i`. Its keys are found through a block table: entry
`j` of the table holds keys `key_start + j * block_size ..`. A whole-context step has
`key_start == 0` and `key_len == context_len`; a *segment* (cold blocks streamed in windows, one
rank's share of a context) has any other range, and its partial results are combined by
`merge_attention`.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_LONG = 16_384  # keys; contexts of this length are always cut into parts, if any are


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The ragged geometry of one step; every tensor is int64 on `query_start.device`.

    Attributes:
        query_start: `[num_seqs + 1]`, first row of each sequence, and the row count.
        context_lens: `[num_seqs]`, tokens of the sequence including this step's.
        key_start: `[num_seqs]`, absolute position of the block table's first key.
        key_lens: `[num_seqs]`, keys reachable through the block table.
        block_tables: `[num_seqs, max_blocks]`, logical to physical; padding is 0, never read.
        positions: `[num_tokens]`, absolute position of every row.
        slot_mapping: `[num_tokens]`, `block * block_size + offset` of every row's own key, or -1
            where it lies outside the segment.
        block_size: tokens per block.
        query_len_list, context_len_list, key_start_list, key_len_list: the same as Python ints.
        max_block_id: largest physical block the tables name, padding included; -1 without any.
        plans: scratch space in which a backend keeps what it derived from this step.
    """

    query_start: Tensor
    context_lens: Tensor
    key_start: Tensor
    key_lens: Tensor
    block_tables: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_size: int
    query_len_list: list[int]
    context_len_list: list[int]
    key_start_list: list[int]
    key_len_list: list[int]
    max_block_id: int
    plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_seqs(self) -> int:
        """Sequences in the step."""
        return len(self.query_len_list)

    @property
    def num_tokens(self) -> int:
        """Rows in the step, over all sequences."""
        return int(self.positions.shape[0])


def build_metadata(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    *,
    key_starts: Sequence[int] | None = None,
    key_lens: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> AttentionMetadata:
    """Describe a step whose sequence `s` computes its last `query_lens[s]` tokens.

    Args:
        query_lens: new tokens of each sequence, at least 1.
        context_lens: tokens of each sequence including the new ones.
        block_tables: physical blocks in logical order; entries past the keys are ignored.
        block_size: tokens per block.
        key_starts: absolute position of each table's first key; default 0.
        key_lens: keys behind each table; default: up to the end of the context.
        device: where the tensors go.

    Raises:
        ValueError: the lists disagree in length, a count is out of range, or a block table is
            too short for its keys.
    """
    starts = [0] * len(query_lens) if key_starts is None else list(key_starts)
    if key_lens is None:
        key_lens = [max(0, c - s) for c, s in zip(context_lens, starts, strict=False)]
    _check_lists(query_lens, context_lens, block_tables, starts, key_lens, block_size)
    packed = _pack_lists(query_lens, context_lens, starts, key_lens)
    table, max_block_id = _pack_tables(block_tables, key_lens, block_size)
    positions = _positions(packed)
    slots = _slots(positions, packed, table, block_size)
    query_start, context, start, length = (packed[row] for row in (0, 1, 2, 3))
    return AttentionMetadata(
        query_start=query_start.to(device),
        context_lens=context[:-1].to(device),
        key_start=start[:-1].to(device),
        key_lens=length[:-1].to(device),
        block_tables=table.to(device),
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        block_size=block_size,
        query_len_list=list(query_lens),
        context_len_list=list(context_lens),
        key_start_list=starts,
        key_len_list=list(key_lens),
        max_block_id=max_block_id,
    )


def warm_up_steps(block_size: int, device: torch.device | str) -> list[AttentionMetadata]:
    """Steps that together launch every variant of the kernels that later steps can ask for.

    A kernel for a GPU is compiled when it is first launched; running these before the first
    request spares it the wait. They read block 0 only, whatever it holds, and write nothing.

    Args:
        block_size: tokens per block.
        device: where the tensors go.
    """
    steps = []
    for keys, query_lens in itertools.product((1, _LONG), ([1], [1, 2])):
        contexts = [max(keys, query_len) for query_len in query_lens]
        tables = [[0] * -(-context // block_size) for context in contexts]
        meta = build_metadata(query_lens, contexts, tables, block_size, device=device)
        steps.append(replace(meta, slot_mapping=torch.full_like(meta.slot_mapping, -1)))
    return steps


def _check_lists(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    key_starts: Sequence[int],
    key_lens: Sequence[int],
    block_size: int,
) -> None:
    """Raise a ValueError that names the first argument out of order."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    columns = {
        "context_lens": len(context_lens),
        "block_tables": len(block_tables),
        "key_starts": len(key_starts),
        "key_lens": len(key_lens),
    }
    for name, count in columns.items():
        if count != len(query_lens):
            raise ValueError(f"{name} has {count} entries for {len(query_lens)} query_lens")
    rows = zip(query_lens, context_lens, block_tables, key_starts, key_lens, strict=True)
    for seq, (query, context, table, start, keys) in enumerate(rows):
        if query < 1 or context < query:
            raise ValueError(f"query_lens[{seq}]={query} must be in 1..context_lens={context}")
        if start < 0 or keys < 0:
            raise ValueError(f"key_starts[{seq}]={start} and key_lens={keys} must not be negative")
        if len(table) * block_size < keys:
            raise ValueError(
                f"block_tables[{seq}] has {len(table)} blocks of {block_size} for {keys} keys"
            )


def _pack_lists(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    key_starts: Sequence[int],
    key_lens: Sequence[int],
) -> Tensor:
    """`[4, num_seqs + 1]` int64: cumulated queries, contexts, key starts, key counts."""
    cumulated = array("q", [0])
    total = 0
    for query in query_lens:
        total += query
        cumulated.append(total)
    for column in (context_lens, key_starts, key_lens):
        cumulated.extend(column)
        cumulated.append(0)
    return torch.frombuffer(cumulated, dtype=torch.int64).view(4, -1)


def _pack_tables(
    block_tables: Sequence[Sequence[int]], key_lens: Sequence[int], block_size: int
) -> tuple[Tensor, int]:
    """Pad the used part of every table to one `[num_seqs, max_blocks]` tensor."""
    used = [-(-keys // block_size) for keys in key_lens]
    width = max(used, default=0)
    if width == 0:
        return torch.zeros(len(used), 0, dtype=torch.int64), -1
    padding = array("q", bytes(8 * width))
    flat = array("q")
    for table, count in zip(block_tables, used, strict=True):
        flat.extend(table if len(table) == count else table[:count])
        if count < width:
            flat.extend(padding[count:])
    tables = torch.frombuffer(flat, dtype=torch.int64).view(-1, width)
    lowest, highest = (int(bound) for bound in tables.aminmax())
    if lowest < 0:
        raise ValueError("block_tables must not hold negative block ids")
    return tables, highest


def _positions(packed: Tensor) -> Tensor:
    """Absolute position of every row."""
    query_start, context = packed[0], packed[1, :-1]
    lens = query_start.diff()
    base = context - query_start[1:]
    num_tokens = int(query_start[-1])
    if num_tokens == lens.shape[0]:
        return context - 1
    return torch.arange(num_tokens) + base.repeat_interleave(lens, output_size=num_tokens)


def _slots(positions: Tensor, packed: Tensor, tables: Tensor, block_size: int) -> Tensor:
    """Slot of every row's own key, -1 where the tables do not reach it."""
    lens = packed[0].diff()
    num_tokens = positions.shape[0]
    if tables.shape[1] == 0:
        return torch.full((num_tokens,), -1, dtype=torch.int64)
    seq = torch.arange(lens.shape[0])
    if num_tokens != lens.shape[0]:
        seq = seq.repeat_interleave(lens, output_size=num_tokens)
    offset = positions - packed[2][seq]
    inside = (offset >= 0) & (offset < packed[3][seq])
    safe = offset.clamp(0, tables.shape[1] * block_size - 1)
    block = safe.div(block_size, rounding_mode="floor")
    slots = tables[seq, block] * block_size + (safe - block * block_size)
    return slots.where(inside, -1)
