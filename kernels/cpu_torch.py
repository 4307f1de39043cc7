"""CPU kernels in plain torch: correct everywhere, and the fallback of the native ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierkv.kernels.metadata import AttentionMetadata


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
    for seq in range(meta.num_seqs):
        first = int(meta.query_start[seq])
        rows = slice(first, first + meta.query_len_list[seq])
        keys, values, positions = _gather(kv, meta, seq)
        if not keys.shape[1]:
            out[rows] = 0
            if lse is not None:
                lse[rows] = -torch.inf
            continue
        distance = meta.positions[rows, None] - positions
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        part, part_lse = _attend(q[rows], keys, values, visible, scale, softcap, sinks)
        out[rows] = part.to(out.dtype)
        if lse is not None:
            lse[rows] = part_lse


def _gather(kv: Tensor, meta: AttentionMetadata, seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's keys and values `[num_kv_heads, num_keys, head_dim]`, and positions."""
    num_keys = meta.key_len_list[seq]
    blocks = kv.index_select(0, meta.block_tables[seq, : -(-num_keys // meta.block_size)])
    tokens = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :num_keys]
    return tokens[0], tokens[1], meta.key_start_list[seq] + torch.arange(num_keys)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of one sequence by explicit fp32 scores."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[0]
    rows = q.float().view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = rows @ keys.float()[:, None].transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    total = lse
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.view(num_kv_heads, -1, 1))
    weights = torch.exp(scores - total[..., None]).nan_to_num_(0.0)
    out = weights @ values.float()[:, None]
    return (
        out.permute(2, 0, 1, 3).reshape(num_rows, num_heads, head_dim),
        total.permute(2, 0, 1).reshape(num_rows, num_heads),
    )
