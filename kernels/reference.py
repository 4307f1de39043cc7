"""The oracle: every op in plain fp32 torch, one sequence at a time, written to be read.

Nothing here is fast and nothing here is clever; the other implementations are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tierkv.kernels.metadata import AttentionMetadata


def write_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Store row `i`'s key and value in slot `slot_mapping[i]`; a negative slot drops the row.

    Args:
        kv: `[num_blocks, 2, num_kv_heads, block_size, head_dim]`, written in place.
        k, v: `[num_tokens, num_kv_heads, head_dim]` of kv's dtype.
        slot_mapping: int64 `[num_tokens]`, `block * block_size + offset`.
    """
    block_size = kv.shape[3]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            kv[slot // block_size, 0, :, slot % block_size] = k[row]
            kv[slot // block_size, 1, :, slot % block_size] = v[row]


def copy_blocks(pool: Tensor, src_ids: Tensor, dst_ids: Tensor, num_tokens: int) -> None:
    """Copy the first `num_tokens` tokens of block `src_ids[i]` to `dst_ids[i]`, in all layers.

    Args:
        pool: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`.
        src_ids, dst_ids: int64 `[n]`; no destination is a source or occurs twice.
        num_tokens: tokens that matter, 1 to block_size; the rest of the block is unspecified.
    """
    for src, dst in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
        pool[dst, :, :, :, :num_tokens] = pool[src, :, :, :, :num_tokens]


def copy_rows(source: Tensor, src_ids: Tensor, destination: Tensor, dst_ids: Tensor) -> None:
    """Row `dst_ids[i]` of `destination` becomes row `src_ids[i]` of `source`.

    Args:
        source, destination: uint8 `[num_rows, num_bytes]`, with different numbers of rows.
        src_ids, dst_ids: int64 `[n]`; no destination occurs twice.
    """
    for src, dst in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
        destination[dst] = source[src]


def partial_attention(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every row over the keys its block table holds, not yet final.

    Args:
        q: `[num_tokens, num_heads, head_dim]`.
        kv: `[num_blocks, 2, num_kv_heads, block_size, head_dim]`.
        meta: the step.
        scale: factor on the scores.
        window: a row at position p sees keys with `p - window < position <= p`.
        softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        `(out, lse)`, fp32 `[num_tokens, num_heads, head_dim]` and `[num_tokens, num_heads]`; the
        natural log of the sum of exponentials. A row that sees no key has out 0 and lse -inf.
    """
    out = torch.zeros(q.shape, dtype=torch.float32)
    lse = torch.full(q.shape[:2], -torch.inf)
    for seq in range(meta.num_seqs):
        first, last = meta.query_start[seq : seq + 2].tolist()
        keys, values, key_positions = _gather(kv, meta, seq)
        if not keys.shape[0]:
            continue
        group = q.shape[1] // keys.shape[1]
        rows = q[first:last].float()
        scores = torch.einsum("qhd,khd->hqk", rows, keys.repeat_interleave(group, 1)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = _visible(meta.positions[first:last], key_positions, window)
        scores = scores.masked_fill(~visible, -torch.inf)
        lse[first:last] = scores.logsumexp(-1).T
        weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True)).nan_to_num(0.0)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))
    return out, lse


def _gather(kv: Tensor, meta: AttentionMetadata, seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's keys and values, fp32 `[num_keys, num_kv_heads, head_dim]`, and positions."""
    num_keys = meta.key_len_list[seq]
    blocks = kv[meta.block_tables[seq, : -(-num_keys // meta.block_size)]]
    tokens = blocks.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :num_keys].float()
    return tokens[0], tokens[1], meta.key_start_list[seq] + torch.arange(num_keys)


def _visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """`[num_rows, num_keys]` bool: which keys each row may see."""
    distance = query_positions[:, None] - key_positions[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Combine partial results over disjoint sets of keys into the result over their union.

    Args:
        outs: each `[num_tokens, num_heads, head_dim]`.
        lses: each fp32 `[num_tokens, num_heads]`.
        sinks: `[num_heads]` logits of one more softmax column that has no value.

    Returns:
        `(out, lse)` of the union, fp32; lse includes the sink.
    """
    stacked = torch.stack([lse.float() for lse in lses])
    if sinks is not None:
        column = sinks.float().expand(1, *stacked.shape[1:])
        stacked = torch.cat([stacked, column])
    lse = stacked.logsumexp(0)
    weights = torch.exp(stacked - lse).nan_to_num(0.0)
    values = torch.stack([out.float() for out in outs])
    return (values * weights[: len(outs), ..., None]).sum(0), lse


def paged_attention(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Final attention of every row, in q's dtype; see `partial_attention` and `merge_attention`."""
    out, lse = partial_attention(q, kv, meta, scale=scale, window=window, softcap=softcap)
    return merge_attention([out], [lse], sinks)[0].to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, round_first: bool) -> Tensor:
    """Rows scaled to a root mean square of 1, then elementwise by weight.

    Args:
        x: `[..., dim]`.
        weight: fp32 `[dim]`.
        eps: added to the mean square.
        round_first: round to x's dtype before weight is applied, as well as after.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype).float()
    return (normed * weight).to(x.dtype)


def act_and_mul(x: Tensor, activation: str) -> Tensor:
    """`[..., 2 * dim]` to `[..., dim]`: the activation of the first half times the second.

    Args:
        x: the halves; the activation is rounded to its dtype.
        activation: "silu" or "gelu_tanh".
    """
    gate, up = x.float().chunk(2, -1)
    if activation == "silu":
        activated = functional.silu(gate)
    else:
        activated = functional.gelu(gate, approximate="tanh")
    return (activated.to(x.dtype).float() * up).to(x.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding: element `i` of a head turns with element `i + head_dim // 2`.

    Args:
        q, k: `[heads, num_tokens, head_dim]`.
        cos, sin: `[num_tokens, head_dim]` of the same dtype, to which every operation rounds.
    """

    def turn(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    return turn(q), turn(k)


def widen_nuclei(
    logits: Tensor, best: Tensor, mass: Tensor, is_open: Tensor, floor: Tensor
) -> None:
    """Lower the floor of rows that are open to the smallest logit that top-p keeps.

    Args:
        logits: fp32 `[rows, vocab]`.
        best, mass: fp32 `[rows]`; the kept logits are those with less than mass above them, in
            units of `exp(logit - best)`. All of them, if together they have less.
        is_open: bool `[rows]`.
        floor: fp32 `[rows]`, written in place.
    """
    for row in is_open.nonzero().flatten().tolist():
        ordered = logits[row].sort(descending=True).values
        reached = (ordered.double() - best[row].double()).exp().cumsum(0)
        above = torch.cat([torch.zeros(1), reached[:-1]])
        kept = ordered[(above < mass[row]) & (ordered > -torch.inf)]
        has_all = reached[-1] < mass[row]
        floor[row] = torch.finfo(floor.dtype).min if has_all else kept[-1]
