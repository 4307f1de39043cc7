"""The step's geometry against arithmetic in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.kernels import ops
from tierkv.kernels.metadata import build_metadata, warm_up_steps


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]], int]:
    """Query lengths, context lengths, block tables, block size."""
    block_size = draw(st.sampled_from([1, 3, 16]))
    contexts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    queries = [draw(st.integers(1, n)) for n in contexts]
    needs = [-(-n // block_size) + draw(st.integers(0, 2)) for n in contexts]
    ids = draw(st.permutations(range(sum(needs))))
    tables, used = [], 0
    for need in needs:
        tables.append(ids[used : used + need])
        used += need
    return queries, contexts, tables, block_size


@given(steps())
@settings(deadline=None, max_examples=60)
def test_whole_contexts(step) -> None:
    queries, contexts, tables, block_size = step
    meta = build_metadata(queries, contexts, tables, block_size)
    rows = [
        (seq, contexts[seq] - queries[seq] + i)
        for seq in range(len(queries))
        for i in range(queries[seq])
    ]
    assert meta.num_tokens == len(rows) and meta.num_seqs == len(queries)
    assert meta.query_start.tolist() == [sum(queries[:s]) for s in range(len(queries) + 1)]
    assert meta.positions.tolist() == [position for _, position in rows]
    assert meta.slot_mapping.tolist() == [
        tables[seq][p // block_size] * block_size + p % block_size for seq, p in rows
    ]
    for seq, context in enumerate(contexts):
        used = -(-context // block_size)
        assert meta.block_tables[seq, :used].tolist() == list(tables[seq][:used])
    assert meta.max_block_id == max(
        b for table, n in zip(tables, contexts, strict=True) for b in table[: -(-n // block_size)]
    )


def test_a_segment_maps_only_its_own_tokens() -> None:
    meta = build_metadata([4], [10], [[7]], 4, key_starts=[4], key_lens=[4])
    assert meta.positions.tolist() == [6, 7, 8, 9]
    assert meta.slot_mapping.tolist() == [30, 31, -1, -1]
    assert meta.key_start.tolist() == [4] and meta.key_lens.tolist() == [4]


def test_a_segment_without_blocks() -> None:
    meta = build_metadata([2], [10], [[]], 4, key_lens=[0])
    assert meta.max_block_id == -1 and meta.slot_mapping.tolist() == [-1, -1]


def test_everything_is_int64() -> None:
    meta = build_metadata([2, 1], [10, 1], [[0, 1, 2], [3]], 4)
    tensors = (meta.query_start, meta.context_lens, meta.key_start, meta.key_lens)
    for tensor in (*tensors, meta.block_tables, meta.positions, meta.slot_mapping):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [3, 4], [[0]], 4), "context_lens has 2"),
        (([1], [3], [[0], [1]], 4), "block_tables has 2"),
        (([0], [3], [[0]], 4), r"query_lens\[0\]=0"),
        (([4], [3], [[0]], 4), r"query_lens\[0\]=4"),
        (([1], [5], [[0]], 4), r"block_tables\[0\] has 1"),
        (([1], [3], [[-1]], 4), "negative block ids"),
        (([1], [3], [[0]], 0), "block_size"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_metadata(*arguments)


def test_refuses_a_negative_segment() -> None:
    with pytest.raises(ValueError, match="key_starts"):
        build_metadata([1], [3], [[0]], 4, key_starts=[-1])


def test_warm_up_steps_write_nothing_and_read_one_block() -> None:
    steps = warm_up_steps(16, "cpu")
    assert len(steps) == 4
    for meta in steps:
        assert meta.max_block_id == 0 and (meta.slot_mapping == -1).all()
        pool = torch.randn(1, 2, 1, 16, 32)
        before = pool.clone()
        ops.write_kv(pool, *torch.randn(2, meta.num_tokens, 1, 32), meta.slot_mapping)
        out = ops.paged_attention(torch.randn(meta.num_tokens, 1, 32), pool, meta, scale=1.0)
        assert torch.equal(pool, before) and out.isfinite().all()
