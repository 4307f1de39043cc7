"""Paged, partial and merged attention against the oracle, on both CPU backends."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from pairwise import pairwise

from tierkv.kernels import ops, reference
from tierkv.kernels.metadata import build_metadata

AXES: dict[str, list[Any]] = {
    "group_and_kv_heads": [(1, 3), (3, 2), (4, 1), (8, 2), (12, 1), (1, 1)],
    "head_dim": [32, 64, 80, 96, 128, 256],
    "block_size": [1, 16, 64, 256],
    "window": [None, 1, 7, 40, 1000],
    "softcap": [None, 5.0],
    "sinks": [False, True],
    "dtype": [torch.float32, torch.bfloat16],
    "lengths": ["decode", "prefill", "mixed", "one", "drafts"],
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def draw_lengths(kind: str, rng: random.Random) -> tuple[list[int], list[int]]:
    """Query and context lengths of a kind of step."""
    contexts = [rng.randint(1, 150) for _ in range(rng.randint(3, 7))]
    if kind == "one":
        return [1], [rng.choice([1, 16, 700])]
    if kind == "decode":
        return [1] * len(contexts), contexts
    if kind == "prefill":
        return list(contexts), contexts
    most = 4 if kind == "drafts" else 150
    return [rng.randint(1, min(c, most)) for c in contexts], contexts


@pytest.mark.parametrize("case", pairwise(AXES), ids=lambda c: "-".join(map(str, c.values())))
def test_agrees_with_the_oracle(case, backend, rng, make_step, shape_type) -> None:
    group, num_kv_heads = case["group_and_kv_heads"]
    shape = shape_type(case["dtype"], group, num_kv_heads, case["head_dim"], case["block_size"])
    step = make_step(shape, *draw_lengths(case["lengths"], rng))
    options = {
        "scale": case["head_dim"] ** -0.5,
        "window": case["window"],
        "softcap": case["softcap"],
    }
    sinks = torch.randn(group * num_kv_heads) if case["sinks"] else None
    found = ops.paged_attention(step.q, step.kv, step.meta, sinks=sinks, **options)
    wanted = reference.paged_attention(step.q, step.kv, step.meta, sinks=sinks, **options)
    limit = TOLERANCE[case["dtype"]]
    torch.testing.assert_close(found, wanted, atol=limit, rtol=limit)
    out, lse = ops.partial_attention(step.q, step.kv, step.meta, **options)
    wanted_out, wanted_lse = reference.partial_attention(step.q, step.kv, step.meta, **options)
    torch.testing.assert_close(out, wanted_out, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, wanted_lse, atol=max(limit / 10, 2e-5), rtol=1e-4)


def test_half_precision(backend, make_step, shape_type) -> None:
    step = make_step(shape_type(torch.float16), [1, 9], [30, 40])
    found = ops.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    wanted = reference.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    torch.testing.assert_close(found, wanted, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("head_dim", [4, 24, 100])
def test_odd_head_dims(head_dim, backend, make_step, shape_type) -> None:
    step = make_step(shape_type(head_dim=head_dim), [1, 9], [30, 40])
    found = ops.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    wanted = reference.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def test_blocks_with_a_padded_stride(backend, make_step, shape_type) -> None:
    step = make_step(shape_type(head_dim=32), [1, 9], [30, 40], pad_elements=40)
    assert step.kv.stride(0) % (32 * 16)
    found = ops.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    wanted = reference.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def test_fills_the_given_output(backend, make_step, shape_type) -> None:
    step = make_step(shape_type(), [1, 5], [30, 40])
    out = torch.full(step.q.shape, torch.nan)
    assert ops.paged_attention(step.q, step.kv, step.meta, scale=0.1, out=out) is out
    assert torch.equal(out, ops.paged_attention(step.q, step.kv, step.meta, scale=0.1))


@pytest.mark.parametrize("query_lens", [[1] * 5, [20, 1, 33, 2, 7]], ids=["decode", "mixed"])
def test_a_sequence_does_not_feel_its_neighbours(query_lens, backend, make_step, shape_type):
    contexts = [700, 33, 64, 128, 500]
    step = make_step(shape_type(group=1), query_lens, contexts)
    together = ops.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    for seq, (query_len, context) in enumerate(zip(query_lens, contexts, strict=True)):
        rows = slice(*step.meta.query_start[seq : seq + 2].tolist())
        meta = build_metadata([query_len], [context], step.block_tables[seq : seq + 1], 16)
        alone = ops.paged_attention(step.q[rows], step.kv, meta, scale=0.125)
        torch.testing.assert_close(alone, together[rows], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("group", [3, 12])
def test_thread_counts_agree(group, num_threads, make_step, shape_type) -> None:
    step = make_step(shape_type(group=group), [1, 70, 1], [3000, 90, 2])
    torch.set_num_threads(num_threads)
    found = ops.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    wanted = reference.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_segments_merge_to_the_whole(window, with_sinks, backend, rng, make_step, shape_type):
    query_lens, contexts = [1, 30, 1, 3], [300, 200, 16, 90]
    step = make_step(shape_type(), query_lens, contexts)
    sinks = torch.randn(step.q.shape[1]) if with_sinks else None
    options = {"scale": 0.125, "window": window}
    wanted = reference.paged_attention(step.q, step.kv, step.meta, sinks=sinks, **options)
    parts = []
    cuts = [0, rng.randint(0, 4), rng.randint(4, 9), 20]
    for begin, end in itertools.pairwise(cuts):
        spans = [(min(c, begin * 16), min(c, end * 16)) for c in contexts]
        meta = build_metadata(
            query_lens,
            contexts,
            [table[begin:end] for table in step.block_tables],
            16,
            key_starts=[first for first, _ in spans],
            key_lens=[last - first for first, last in spans],
        )
        parts.append(ops.partial_attention(step.q, step.kv, meta, **options))
    merged, _ = ops.merge_attention(*zip(*parts, strict=True), sinks)
    torch.testing.assert_close(merged, wanted, atol=2e-5, rtol=2e-5)


def test_rows_that_see_nothing(backend, make_step, shape_type) -> None:
    step = make_step(shape_type(), [1, 20], [40, 40])
    meta = build_metadata([1, 20], [40, 40], [[], step.block_tables[1][:1]], 16, key_lens=[0, 16])
    out, lse = ops.partial_attention(step.q, step.kv, meta, scale=0.125, window=10)
    wanted_out, wanted_lse = reference.partial_attention(
        step.q, step.kv, meta, scale=0.125, window=10
    )
    assert not out[0].any() and torch.isneginf(lse[0]).all() and torch.isneginf(lse[-1]).all()
    torch.testing.assert_close(out, wanted_out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=2e-5)


def test_merging_nothing_with_nothing() -> None:
    empty = (torch.zeros(2, 3, 8), torch.full((2, 3), -torch.inf))
    out, lse = ops.merge_attention([empty[0]] * 2, [empty[1]] * 2)
    assert not out.any() and torch.isneginf(lse).all()


def test_merge_agrees_with_the_oracle(rng) -> None:
    outs = [torch.randn(5, 4, 16) for _ in range(3)]
    lses = [torch.randn(5, 4) * 10 for _ in range(3)]
    sinks = torch.randn(4)
    for found, wanted in zip(
        ops.merge_attention(outs, lses, sinks),
        reference.merge_attention(outs, lses, sinks),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_large_scores_stay_finite(backend, make_step, shape_type) -> None:
    step = make_step(shape_type(), [1, 20], [90, 40])
    found = ops.paged_attention(step.q * 40, step.kv, step.meta, scale=1.0)
    wanted = reference.paged_attention(step.q * 40, step.kv, step.meta, scale=1.0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_offsets_pass_two_to_the_31(backend) -> None:
    """A pool of 2^31 elements and more; pages that nothing touches cost no memory."""
    block = 2 * 16 * 64
    num_blocks = 2**31 // block + 2
    kv = torch.empty(num_blocks * block, dtype=torch.bfloat16).view(num_blocks, 2, 1, 16, 64)
    low, high = kv[:1], kv[-1:]
    k, v = torch.randn(2, 16, 1, 64).bfloat16()
    slots = torch.arange(16)
    ops.write_kv(kv, k, v, slots + (num_blocks - 1) * 16)
    ops.write_kv(kv, k, v, slots)
    assert torch.equal(low, high) and torch.equal(high[0, 0, 0], k[:, 0])
    q = torch.randn(1, 1, 64).bfloat16()
    found = [
        ops.paged_attention(q, kv, build_metadata([1], [16], [[b]], 16), scale=0.125)
        for b in (0, num_blocks - 1)
    ]
    assert torch.equal(*found)
