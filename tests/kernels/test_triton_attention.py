"""Attention by Triton's kernels against the oracle: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from pairwise import pairwise
from triton_steps import DEVICE, attend, meta_on_device, on_device

from tierkv.kernels import reference
from tierkv.kernels.metadata import build_metadata
from tierkv.kernels.triton import tiles
from tierkv.kernels.triton.attention import step_tiles
from tierkv.kernels.triton.merge import merge_attention
from tierkv.kernels.triton.tiles import Device

AXES: dict[str, list[Any]] = {
    "group_and_kv_heads": [(1, 3), (4, 2), (8, 1), (71, 1), (3, 2)],
    "head_dim": [64, 80, 96, 128, 256, 24],
    "block_size": [16, 32, 128, 256, 8],
    "lengths": ["decode", "prefill", "mixed", "long", "drafts"],
    "window": [None, 1, 7, 40, 1000],
    "softcap": [None, 5.0],
    "sinks": [False, True],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "num_sms": [1, 132],
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launches allocate for partial results starts as NaN."""
    allocate = torch.Tensor.new_empty

    def poisoned(x: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        found = allocate(x, *size, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def whole_grid() -> list[dict[str, Any]]:
    """Every shape and kind of step, the rest by turns."""
    rng = random.Random(0)
    names = ("group_and_kv_heads", "head_dim", "block_size", "lengths")
    cases = []
    for values in itertools.product(*(AXES[name] for name in names)):
        drawn = {name: rng.choice(axis) for name, axis in AXES.items() if name not in names}
        cases.append(dict(zip(names, values, strict=True)) | drawn)
    return cases


def draw_lengths(kind: str, longest: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Query and context lengths of a kind of step."""
    if kind == "long":  # cut into parts, some without keys
        return [1, 1], [rng.randint(513, 700), rng.randint(1, 20)]
    contexts = [rng.randint(1, longest) for _ in range(3)]
    if kind == "decode":
        return [1] * 3, contexts
    if kind == "prefill":
        return list(contexts), contexts
    if kind == "drafts":
        return [rng.randint(1, min(c, 4)) for c in contexts], contexts
    return [1, rng.randint(1, longest), 1], [contexts[0], longest + contexts[2], contexts[1]]


def check(case: dict[str, Any], rng, make_step, shape_type) -> None:
    """Final and partial results of a case agree with the oracle's."""
    group, num_kv_heads = case["group_and_kv_heads"]
    shape = shape_type(case["dtype"], group, num_kv_heads, case["head_dim"], case["block_size"])
    longest = 60 if group < 16 else 20  # the interpreter takes a while for 71 heads
    step = make_step(shape, *draw_lengths(case["lengths"], longest, rng))
    options = {name: case[name] for name in ("window", "softcap")}
    options["scale"] = case["head_dim"] ** -0.5
    sinks = torch.randn(group * num_kv_heads) if case["sinks"] else None
    problem = (step.q, step.kv, step.meta)
    limit = TOLERANCE[case["dtype"]]
    found, _ = attend(*problem, num_sms=case["num_sms"], sinks=sinks, **options)
    wanted = reference.paged_attention(*problem, sinks=sinks, **options)
    torch.testing.assert_close(found, wanted, atol=limit, rtol=limit)
    out, lse = attend(*problem, num_sms=case["num_sms"], is_partial=True, **options)
    wanted_out, wanted_lse = reference.partial_attention(*problem, **options)
    torch.testing.assert_close(out, wanted_out, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, wanted_lse, atol=max(limit / 10, 2e-5), rtol=1e-4)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


@pytest.mark.parametrize("case", pairwise(AXES), ids=name_of)
def test_agrees_with_the_oracle(case, rng, make_step, shape_type) -> None:
    check(case, rng, make_step, shape_type)


@pytest.mark.full
@pytest.mark.parametrize("case", whole_grid(), ids=name_of)
def test_the_whole_grid(case, rng, make_step, shape_type) -> None:
    check(case, rng, make_step, shape_type)


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [30, 1, 33]], ids=["decode", "mixed"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("num_sms", [1, 40])
def test_segments_merge_to_the_whole(query_lens, window, num_sms, rng, make_step, shape_type):
    contexts = [300, 16, 90]
    step = make_step(
        shape_type(), query_lens, [max(*pair) for pair in zip(contexts, query_lens, strict=True)]
    )
    contexts = step.context_lens
    sinks = torch.randn(step.q.shape[1])
    options = {"scale": 0.125, "window": window}
    wanted = reference.paged_attention(step.q, step.kv, step.meta, sinks=sinks, **options)
    parts = []
    for begin, end in itertools.pairwise([0, rng.randint(0, 4), rng.randint(4, 9), 20]):
        spans = [(min(c, begin * 16), min(c, end * 16)) for c in contexts]
        meta = build_metadata(
            query_lens,
            contexts,
            [table[begin:end] for table in step.block_tables],
            16,
            key_starts=[first for first, _ in spans],
            key_lens=[last - first for first, last in spans],
        )
        parts.append(attend(step.q, step.kv, meta, num_sms=num_sms, is_partial=True, **options))
    outs, lses = ([x.to(DEVICE) for x in column] for column in zip(*parts, strict=True))
    merged, _ = merge_attention(outs, lses, sinks.to(DEVICE))
    torch.testing.assert_close(merged.cpu(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_sms", [1, 40])
def test_rows_that_see_nothing(num_sms, make_step, shape_type) -> None:
    step = make_step(shape_type(), [1, 20], [40, 600])
    meta = build_metadata([1, 20], [40, 600], [[], step.block_tables[1]], 16, key_lens=[0, 590])
    options = {"scale": 0.125, "window": 10}
    found = attend(step.q, step.kv, meta, num_sms=num_sms, is_partial=True, **options)
    wanted = reference.partial_attention(step.q, step.kv, meta, **options)
    assert not found[0][0].any() and torch.isneginf(found[1][[0, -1]]).all()
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    sinks = torch.randn(step.q.shape[1])
    final, _ = attend(step.q, step.kv, meta, num_sms=num_sms, sinks=sinks, **options)
    assert not final[0].any() and final.isfinite().all()


def test_large_scores_stay_finite(make_step, shape_type) -> None:
    step = make_step(shape_type(), [1, 20], [90, 40])
    found, _ = attend(step.q * 40, step.kv, step.meta, scale=1.0)
    wanted = reference.paged_attention(step.q * 40, step.kv, step.meta, scale=1.0)
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=1e-3)  # scores of 1e3, in fp32


def test_blocks_with_a_padded_stride(make_step, shape_type) -> None:
    step = make_step(shape_type(head_dim=32), [1, 9], [30, 40], pad_elements=40)
    assert step.kv.stride(0) % (32 * 16)
    found, _ = attend(step.q, step.kv, step.meta, scale=0.125)
    wanted = reference.paged_attention(step.q, step.kv, step.meta, scale=0.125)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("window", [None, 100])
def test_decode_follows_the_tensors_not_the_lists(num_sms, window, make_step, shape_type) -> None:
    """A captured launch sees later steps through the same tensors, padded with empty rows."""
    step = make_step(shape_type(), [1, 1], [600, 33])
    tables = [[0] * 64] * 4
    meta = meta_on_device(build_metadata([1] * 4, [1024] * 4, tables, 16))
    for row, table in enumerate(step.block_tables):
        used = torch.tensor(table[: -(-step.context_lens[row] // 16)])
        meta.block_tables[row, : len(used)] = used.to(DEVICE)
    for lengths in (meta.context_lens, meta.key_lens):
        lengths.copy_(torch.tensor([600, 33, 0, 0]))
    q = torch.full((4, *step.q.shape[1:]), torch.nan)
    q[:2] = step.q
    found, _ = attend(q, step.kv, meta, num_sms=num_sms, scale=0.125, window=window)
    wanted = reference.paged_attention(step.q, step.kv, step.meta, scale=0.125, window=window)
    torch.testing.assert_close(found[:2], wanted, atol=2e-5, rtol=2e-5)
    assert not found[2:].any()


def test_offsets_pass_two_to_the_31() -> None:
    """A pool of 2^31 elements and more; pages that nothing touches cost no memory."""
    block = 2 * 16 * 64
    num_blocks = 2**31 // block + 2
    kv = torch.empty(num_blocks * block, dtype=torch.float16).view(num_blocks, 2, 1, 16, 64)
    kv[0] = kv[-1] = torch.randn(2, 1, 16, 64).half()
    kv = kv.to(DEVICE)
    for num_rows in (1, 5):
        q = torch.randn(num_rows, 1, 64).half()
        found = [
            attend(q, kv, build_metadata([num_rows], [16], [[block_id]], 16), scale=0.125)[0]
            for block_id in (0, num_blocks - 1)
        ]
        assert found[0].any() and torch.equal(*found)


def test_heads_too_wide_are_refused() -> None:
    kv = torch.zeros(1, 2, 1, 16, 320)
    meta = build_metadata([1], [1], [[0]], 16)
    with pytest.raises(ValueError, match="head_dim 320"):
        attend(torch.zeros(1, 1, 320), kv, meta, scale=1.0)


def test_tiles_cover_every_row_once_and_start_with_the_most_keys() -> None:
    queries, contexts = [70, 1, 33, 1, 2], [70, 9, 900, 1, 2]
    tables = [[0] * -(-c // 16) for c in contexts]
    meta = meta_on_device(build_metadata(queries, contexts, tables, 16))
    chunks, single = step_tiles(meta, 32)
    assert chunks.tolist() == [[2, 32], [2, 0], [0, 64], [0, 32], [4, 0], [0, 0]]
    assert single.tolist() == [[1, 0], [3, 0]]
    assert step_tiles(meta, 32)[0] is chunks


def test_parts_fill_the_gpu_and_stay_long_enough() -> None:
    shape = tiles.attend_shape(
        tiles.Tile(16, 64, 4, 3), tiles.KvShape(8, 16, 128), 4, is_decode=True
    )
    gpu = Device(132, (9, 0))
    assert tiles.count_parts(8, 32_768, gpu, shape) == 33
    assert tiles.count_parts(8, 500, gpu, shape) == 2  # of 256 keys or more
    assert tiles.count_parts(2048, 1000, gpu, shape) == 1
    assert tiles.count_parts(2048, 131_072, gpu, shape) == 16  # none longer than 8192
    assert tiles.count_parts(0, 0, gpu, shape) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_segments", [1, 2, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_merge_agrees_with_the_oracle(dtype, num_segments, with_sinks, rng) -> None:
    outs = [torch.randn(5, 4, 24).to(dtype) for _ in range(num_segments)]
    lses = [torch.randn(5, 4) * 10 for _ in range(num_segments)]
    for out, lse in zip(outs, lses, strict=True):
        lse[0], out[0] = -torch.inf, 0  # no segment has a key for this row
    sinks = torch.randn(4) if with_sinks else None
    found = merge_attention(
        [on_device(out) for out in outs],
        [on_device(lse) for lse in lses],
        None if sinks is None else sinks.to(DEVICE),
    )
    wanted = reference.merge_attention(outs, lses, sinks)
    torch.testing.assert_close([x.cpu() for x in found], list(wanted))
