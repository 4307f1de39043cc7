"""The attention kernel: a tile of rows over a part of one sequence's keys.

    out[r, h] = sum_j softmax_j(cap(scale * q[r, h] . k[j])) v[j],   cap(x) = c tanh(x / c)

The rows of a tile are consecutive new tokens times the query heads of one KV head's group, so that
a key read once serves them all, and the products run on tensor cores even where a sequence has a
single new token. Keys are found through the block table, `block_n` at a time; softmax is kept
online, in base 2 (Dao, FlashAttention-2; long contexts are cut into parts as in "flash decoding").
Decode and prefill are this kernel with different tiles: one token, or as many as fill a tile.

Everything that changes from step to step (lengths, tables) is read from device tensors, so a launch
can be captured in a graph. Sequences without keys give zeros and an lse of -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_keys(base, table, start, num_keys, kv_block, S: tl.constexpr, MASKED: tl.constexpr):
    """Keys and values `start .. start + block_n - 1` of one head, each `[block_n, block_d]`.

    Every read of the pool is this one. base points at the head's keys in block 0, table at the
    sequence's block ids, blocks are `kv_block` elements apart; start is a multiple of block_n.
    Keys from `num_keys` on are zeros if MASKED; otherwise all of them are live.
    """
    lane = tl.arange(0, S.block_n)
    dims = tl.arange(0, S.block_d)
    live = start + lane < num_keys
    if S.block_size % S.block_n == 0:  # the tile lies in one block
        block = tl.load(table + start // S.block_size) + tl.zeros_like(lane)
        slot = start % S.block_size + lane
    elif MASKED:
        block = tl.load(table + (start + lane) // S.block_size, mask=live, other=0)
        slot = (start + lane) % S.block_size
    else:
        block = tl.load(table + (start + lane) // S.block_size)
        slot = (start + lane) % S.block_size
    rows = block * kv_block + slot * S.head_dim
    pointers = base + rows[:, None] + dims[None, :]
    V_OFFSET: tl.constexpr = S.num_kv_heads * S.block_size * S.head_dim
    if MASKED:
        mask = live[:, None] & (dims < S.head_dim)[None, :]
        return tl.load(pointers, mask, other=0.0), tl.load(pointers + V_OFFSET, mask, other=0.0)
    elif S.head_dim != S.block_d:
        mask = (dims < S.head_dim)[None, :]
        return tl.load(pointers, mask, other=0.0), tl.load(pointers + V_OFFSET, mask, other=0.0)
    else:
        return tl.load(pointers), tl.load(pointers + V_OFFSET)


@triton.jit
def visible_scores(scores, start, last, num_keys, window, S: tl.constexpr):
    """scores, -inf where row m does not see the key: it sees those up to position `last[m]`."""
    keys = (start + tl.arange(0, S.block_n))[None, :]
    visible = (keys <= last[:, None]) & (keys < num_keys)
    if S.has_window:
        visible &= keys > last[:, None] - window
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def attend_keys(
    state, q, begin, end, last, base, table, num_keys, kv_block, window, factors,
    S: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys `begin .. end - 1` into the online softmax.

    state is the weighted sum of values `[block_m, block_d]`, and `[block_m]` the sum of weights
    and the highest score so far, in base 2; all keys are visible to all rows unless MASKED.
    """
    acc, total, highest = state
    factor, inner, cap = factors
    for start in tl.range(begin, end, S.block_n):
        k, v = load_keys(base, table, start, num_keys, kv_block, S, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=S.precision)
        if S.has_softcap:
            scores = cap - 2 * cap / (1 + tl.exp2(scores * inner))
        if MASKED:
            scores = visible_scores(scores, start, last, num_keys, window, S)
        higher = tl.maximum(highest, tl.max(scores, 1) * factor)
        # A row that has seen nothing yet is at -inf, and the difference of two of these is NaN.
        base_line = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        weights = tl.exp2(scores * factor - base_line[:, None])
        kept = tl.exp2(highest - base_line)
        total = total * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=S.precision)
        highest = higher
    return acc, total, highest


@triton.jit
def tile_rows(tiles, query_start, S: tl.constexpr):
    """The program's sequence, its tile's first token there, first row and number of tokens."""
    if tiles is None:  # one tile per sequence
        seq = tl.program_id(0)
        first = 0
    else:
        seq = tl.load(tiles + 2 * tl.program_id(0))
        first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    row = tl.load(query_start + seq)
    query_len = (tl.load(query_start + seq + 1) - row).to(tl.int32)
    return seq, first, row + first, tl.minimum(S.tokens, query_len - first), query_len


@triton.jit
def key_range(position, num_tokens, num_keys, window, S: tl.constexpr):
    """The keys `begin .. end - 1` of this program's part of the context.

    position is that of the tile's first token, counted from the table's first key. All parts
    have as many key tiles, `min_tiles` at least, so a short context has few that are not empty.
    """
    end = tl.minimum(num_keys, position + num_tokens)
    begin = 0
    if S.has_window:
        begin = tl.maximum(position - window + 1, 0) // S.block_n * S.block_n
    part = S.block_n * tl.cdiv(tl.maximum(end - begin, 0), S.block_n)
    if S.is_split:
        num_tiles = tl.cdiv(part // S.block_n, tl.num_programs(2))
        part = tl.maximum(num_tiles, S.min_tiles) * S.block_n
        begin += tl.program_id(2) * part
    return begin, tl.minimum(end, begin + part)


@triton.jit
def store_rows(state, out, lse, sinks, row, head, live, filled, S: tl.constexpr):
    """Divide by the sum of weights and store; sinks are one more weight without a value.

    live: the rows that exist; filled: those whose out matters, not lse alone.
    """
    acc, total, highest = state
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0.0) * 1.4426950408889634
        higher = tl.maximum(highest, sink)
        total = total * tl.exp2(highest - higher) + tl.exp2(sink - higher)
        acc = acc * tl.exp2(highest - higher)[:, None]
        highest = higher
    dims = tl.arange(0, S.block_d)
    total = tl.where(total > 0, total, 1.0)  # a row that saw nothing has highest -inf
    result = acc / total[:, None]
    places = row * S.num_heads + head
    mask = filled[:, None] & (dims < S.head_dim)[None, :]
    pointers = out + places[:, None] * S.head_dim + dims[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask)
    if lse is not None:
        tl.store(lse + places, (highest + tl.log2(total)) * 0.6931471805599453, live)


# What changes from step to step is not specialised, so that no step waits for a compiler.
@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=[
        *("lse", "sinks", "query_start", "context_lens", "key_start", "key_lens"),
        *("block_tables", "tiles"),
    ],
)
def attend(
    q, kv, out, lse, sinks, query_start, context_lens, key_start, key_lens, block_tables, tiles,
    q_row, q_head, kv_block, table_stride, window, factor, inner, cap, S: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one KV head's tile of heads, one part of the context.

    Grid: (tiles, num_kv_heads * head_tiles, parts). S is an `AttendShape`.

    q is `[num_tokens, num_heads, head_dim]` by its strides, kv one layer's blocks. out
    `[num_tokens, num_heads, head_dim]` and lse (or None) are the result; of a split context fp32
    `[parts, tiles * tokens, ...]`, for `merge_parts`. tiles is int32 `[num_tiles, 2]`, sequence
    and first token, or None for a tile per sequence. sinks (or None): `[num_heads]`.
    """
    seq, first, row, num_tokens, query_len = tile_rows(tiles, query_start, S)
    num_keys = tl.load(key_lens + seq).to(tl.int32)
    position = tl.load(context_lens + seq) - query_len + first - tl.load(key_start + seq)
    position = position.to(tl.int32)
    begin, end = key_range(position, num_tokens, num_keys, window, S)

    lane = tl.arange(0, S.block_m)
    token = lane // S.heads
    kv_head = tl.program_id(1) // S.head_tiles
    in_group = tl.program_id(1) % S.head_tiles * S.heads + lane % S.heads
    head = kv_head.to(tl.int64) * S.group + in_group
    live = (token < num_tokens) & (in_group < S.group)
    last = position + tl.minimum(token, num_tokens - 1)
    dims = tl.arange(0, S.block_d)
    pointers = q + ((row + token) * q_row + head * q_head)[:, None] + dims[None, :]
    q_tile = tl.load(pointers, mask=live[:, None] & (dims < S.head_dim)[None, :], other=0.0)

    base = kv + kv_head * (S.block_size * S.head_dim)
    table = block_tables + seq.to(tl.int64) * table_stride
    nothing = tl.full([S.block_m], float("-inf"), tl.float32)
    empty = tl.full([S.block_m, S.block_d], 0.0, tl.float32)
    state = empty, tl.zeros_like(nothing), nothing
    factors = factor, inner, cap
    if S.has_whole:  # most keys of a chunk are visible to all of its rows
        whole = tl.minimum(end, position + 1) // S.block_n * S.block_n
        whole = tl.maximum(begin, whole)
        state = attend_keys(
            state, q_tile, begin, whole, last, base, table, num_keys, kv_block, window, factors,
            S, False,
        )  # fmt: skip
        begin = whole
    state = attend_keys(
        state, q_tile, begin, end, last, base, table, num_keys, kv_block, window, factors, S, True
    )
    filled = live
    if S.is_split:
        filled = live & (lane * 0 + begin < end)
        num_rows = tl.num_programs(0) * S.tokens
        row = tl.program_id(2).to(tl.int64) * num_rows + tl.program_id(0) * S.tokens
    store_rows(state, out, lse, sinks, row + token, head, live, filled, S)
