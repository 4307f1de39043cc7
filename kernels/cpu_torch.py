"""CPU kernels in plain torch: correct everywhere, and the fallback of the native ones.

Attention gathers the blocks of a group of sequences of similar length into padded tensors and
calls torch's flash attention on them. What can be known before the layers run (groups, gather
indices, masks of decode rows) is worked out once per step and kept in the step's `plans`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tierkv.kernels import reference
from tierkv.kernels.metadata import AttentionMetadata

_ROWS_AT_ONCE = 256  # of one sequence; bounds the mask and the scores
_BLOCKS_AT_ONCE = 256  # gathered for one group of decode rows, unless one sequence has more
_FULLNESS = 0.75  # a group's shortest sequence has at least this part of its longest one's blocks


def write_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `ops.write_kv`."""
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        keep = slot_mapping >= 0
        k, v, slot_mapping = k[keep], v[keep], slot_mapping[keep]
    block_size = kv.shape[3]
    block = slot_mapping.div(block_size, rounding_mode="floor")
    offset = slot_mapping - block * block_size
    try:
        kv[block, 0, :, offset] = k
        kv[block, 1, :, offset] = v
    except IndexError as error:
        raise ValueError(f"slot_mapping has a slot outside kv: {error}") from None


def copy_blocks(pool: Tensor, src_ids: Tensor, dst_ids: Tensor, num_tokens: int) -> None:
    """See `ops.copy_blocks`; whole blocks, because one contiguous range copies fastest."""
    pool.index_copy_(0, dst_ids, pool.index_select(0, src_ids))


def copy_rows(source: Tensor, src_ids: Tensor, destination: Tensor, dst_ids: Tensor) -> None:
    """See `ops.copy_rows`."""
    destination.index_copy_(0, dst_ids, source.index_select(0, src_ids))


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ops.merge_attention`."""
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.expand_as(lse))
    weights = torch.exp(stacked - lse).nan_to_num_(0.0)[..., None]
    merged = outs[0].float() * weights[0]
    for part, weight in zip(outs[1:], weights[1:], strict=True):
        merged = torch.addcmul(merged, part.float(), weight)
    return merged, lse


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """See `ops.rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((normed.to(x.dtype) if round_first else normed) * weight).to(x.dtype)


def act_and_mul(x: Tensor, activation: str) -> Tensor:
    """See `ops.act_and_mul`."""
    gate, up = x.chunk(2, -1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.rotate`."""
    return reference.rotate(q, k, cos, sin)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences whose attention is computed in one call, padded to as many blocks each.

    Attributes:
        rows: int64 `[num_seqs * query_len]`, or a slice, of the step's rows.
        query_len: rows per sequence.
        blocks: int64 `[num_seqs, num_blocks]`; padding repeats a block of the sequence.
        positions: `[num_seqs, query_len]`, absolute, of the rows.
        key_start: `[num_seqs]`, position of the first gathered key.
        key_lens: `[num_seqs]`, keys that are live.
        torn: indices (sequence, block) of the blocks that hold keys that are not.
    """

    rows: Tensor | slice
    query_len: int
    blocks: Tensor
    positions: Tensor
    key_start: Tensor
    key_lens: Tensor
    torn: tuple[Tensor, Tensor]


def attention(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Fill out, and lse if given, with the attention of every row; see `ops.paged_attention`."""
    groups: list[_Group] | None = meta.plans.get("torch")
    if groups is None:
        groups = meta.plans["torch"] = list(_decode_groups(meta))
    for group in (*groups, *_prefill_groups(meta, window)):
        part, part_lse = _attend(q, kv, meta, group, scale, window, softcap)
        if sinks is not None:
            part = part.float() * torch.sigmoid(part_lse - sinks)[..., None]
            part_lse = torch.logaddexp(part_lse, sinks.expand_as(part_lse))
        out[group.rows] = part.to(out.dtype)
        if lse is not None:
            lse[group.rows] = part_lse


def _decode_groups(meta: AttentionMetadata) -> Iterator[_Group]:
    """Sequences with one row, grouped by length."""
    used = {
        seq: -(-meta.key_len_list[seq] // meta.block_size)
        for seq, query_len in enumerate(meta.query_len_list)
        if query_len == 1
    }
    members: list[int] = []
    for seq in sorted(used, key=used.__getitem__, reverse=True):
        longest = used[members[0]] if members else 0
        full = (len(members) + 1) * longest > _BLOCKS_AT_ONCE
        if members and (full or used[seq] < _FULLNESS * longest):
            yield _decode_group(meta, members, longest)
            members = []
        members.append(seq)
    if members:
        yield _decode_group(meta, members, used[members[0]])


def _decode_group(meta: AttentionMetadata, members: list[int], num_blocks: int) -> _Group:
    """The group of these sequences, padded to `num_blocks`."""
    seqs = torch.tensor(members)
    rows = meta.query_start[seqs]
    blocks = meta.block_tables[seqs, :num_blocks]
    key_lens = meta.key_lens[seqs]
    ends = (torch.arange(num_blocks) + 1) * meta.block_size
    beyond = ends - meta.block_size >= key_lens[:, None]
    return _Group(
        rows=rows,
        query_len=1,
        blocks=blocks.where(~beyond, blocks[:, :1]),
        positions=meta.positions[rows, None],
        key_start=meta.key_start[seqs],
        key_lens=key_lens,
        torn=_indices(ends > key_lens[:, None]),
    )


def _prefill_groups(meta: AttentionMetadata, window: int | None) -> Iterator[_Group]:
    """Runs of rows of the sequences with several, each with the blocks that it sees."""
    size = meta.block_size
    for seq, query_len in enumerate(meta.query_len_list):
        if query_len == 1:
            continue
        start, keys = meta.key_start_list[seq], meta.key_len_list[seq]
        position = meta.context_len_list[seq] - query_len
        row = sum(meta.query_len_list[:seq])
        for first in range(0, query_len, _ROWS_AT_ONCE):
            num_rows = min(_ROWS_AT_ONCE, query_len - first)
            begin = 0 if window is None else position + first - window + 1 - start
            begin = min(max(begin, 0), keys) // size
            end = min(max(position + first + num_rows - start, 0), keys)
            yield _Group(
                rows=slice(row + first, row + first + num_rows),
                query_len=num_rows,
                blocks=meta.block_tables[seq : seq + 1, begin : max(begin, -(-end // size))],
                positions=meta.positions[None, row + first : row + first + num_rows],
                key_start=torch.tensor([start + begin * size]),
                key_lens=torch.tensor([max(0, end - begin * size)]),
                torn=_last_block(end % size, -(-end // size) - begin),
            )


def _last_block(remainder: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Where the torn block of a single sequence is, if its last block is not full."""
    torn = torch.tensor([num_blocks - 1] if remainder and num_blocks > 0 else [], dtype=torch.int64)
    return torch.zeros_like(torn), torn


def _indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a 2-D mask holds."""
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns


def _attend(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    group: _Group,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """A group's `[num_rows, num_heads, head_dim]` out and fp32 `[num_rows, num_heads]` lse."""
    num_seqs, num_blocks = group.blocks.shape
    num_heads, num_kv_heads, head_dim = q.shape[1], kv.shape[2], kv.shape[4]
    rows = q[group.rows]
    if not num_blocks:
        return torch.zeros_like(rows), torch.full(rows.shape[:2], -torch.inf)
    keys, values = _gather(kv, group)
    folded = rows.view(num_seqs, group.query_len, num_kv_heads, -1, head_dim).transpose(1, 2)
    folded = folded.transpose(2, 3)  # [num_seqs, num_kv_heads, group, query_len, head_dim]
    # Heads that share keys are one more batch dimension, and the keys are not copied for them.
    shape = (num_seqs * num_kv_heads, num_heads // num_kv_heads, -1, head_dim)
    keys, values = (x.flatten(0, 1)[:, None].expand(-1, shape[1], -1, -1) for x in (keys, values))
    visible = _visible(group, keys.shape[2], window)
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    attend = _flash if softcap is None else _explicit
    folded = folded.reshape(shape)
    out, lse = attend(folded, keys, values, _per_head(mask, num_kv_heads), scale, softcap)
    seen = _per_head(visible.any(-1), num_kv_heads)
    lse = lse.masked_fill(~seen, -torch.inf)
    out = out.masked_fill(~seen[..., None], 0)
    unfolded = (num_seqs, num_kv_heads, num_heads // num_kv_heads, group.query_len)
    out = out.view(*unfolded, head_dim).permute(0, 3, 1, 2, 4).reshape(rows.shape)
    return out, lse.float().reshape(unfolded).permute(0, 3, 1, 2).reshape(rows.shape[:2])


def _per_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[num_seqs, ...]` as `[num_seqs * num_kv_heads, 1, ...]`, copied only if it must be."""
    if x.shape[0] == 1:
        return x[None].expand(num_kv_heads, *x[None].shape[1:])
    return x.repeat_interleave(num_kv_heads, 0)[:, None]


def _gather(kv: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
    """The group's keys and values, `[num_seqs, num_kv_heads, num_keys, head_dim]`, dead ones 0."""
    size = kv.shape[3]
    seqs, torn = group.torn
    dead = (torn * size)[:, None] + torch.arange(size) >= group.key_lens[seqs, None]
    found = []
    for blocks in _gather_blocks(kv, group.blocks):
        if len(torn):
            kept = blocks[seqs, :, torn].masked_fill(dead[:, None, :, None], 0)
            blocks[seqs, :, torn] = kept
        found.append(blocks.flatten(2, 3))
    return found[0], found[1]


def _gather_blocks(kv: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of blocks `[num_seqs, n]` as `[num_seqs, num_kv_heads, n, block_size, head_dim]`."""
    num_blocks, _, heads, size, dim = kv.shape
    per_block, remainder = divmod(kv.stride(0), size * dim)
    if remainder:
        whole = kv[blocks].permute(2, 0, 3, 1, 4, 5).contiguous()
        return whole[0], whole[1]
    # One row of this table is one head's K or V of one block: gathered in the order wanted.
    table = kv.as_strided(((num_blocks - 1) * per_block + 2 * heads, size * dim), (size * dim, 1))
    index = blocks[:, None] * per_block + torch.arange(heads)[:, None]
    keys, values = (table.index_select(0, i.flatten()) for i in (index, index + heads))
    return keys.view(*index.shape, size, dim), values.view(*index.shape, size, dim)


def _visible(group: _Group, num_keys: int, window: int | None) -> Tensor:
    """`[num_seqs, query_len, num_keys]` bool: which gathered keys each row sees."""
    index = torch.arange(num_keys)
    last = (group.positions - group.key_start[:, None]).minimum(group.key_lens[:, None] - 1)
    seen = index <= last[..., None]
    if window is not None:
        first = group.positions - group.key_start[:, None] - window
        seen &= index > first[..., None]
    return seen


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` by torch's own kernel; softcap is None."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return out, lse


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` by fp32 scores that exist as a tensor, for what flash attention cannot do."""
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).nan_to_num_(0.0) @ v.float(), lse
