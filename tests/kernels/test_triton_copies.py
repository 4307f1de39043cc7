"""Writing keys and values, and copying blocks, by Triton's kernels; see `triton_steps`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_steps import DEVICE, on_device

from tierkv.kernels import reference
from tierkv.kernels.triton import copies

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_bytes(rows: int, num_bytes: int, gap: int, offset: int = 0) -> Tensor:
    """uint8 `[rows, num_bytes]` with gaps, `offset` bytes past an aligned address."""
    flat = torch.randint(0, 256, (offset + rows * (num_bytes + gap),), dtype=torch.uint8)
    return flat[offset:].view(rows, -1)[:, :num_bytes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(2, 24), (1, 256), (20, 64), (3, 80)])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_write_kv(dtype, heads, dim, block_size, rng) -> None:
    num_tokens = rng.randint(1, 20)
    num_blocks = -(-num_tokens // block_size) + 3
    pool = torch.full((num_blocks, 3, 2, heads, block_size, dim), torch.nan, dtype=dtype)
    wanted, found = pool.clone(), on_device(pool)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[rng.randrange(num_tokens)] = -1
    k, v = (torch.randn(heads, num_tokens, dim).to(dtype).transpose(0, 1) for _ in range(2))
    copies.write_kv(found[:, 1], on_device(k), on_device(v), slots.to(DEVICE))
    reference.write_kv(wanted[:, 1], k, v, slots)
    assert torch.equal(found.cpu().nan_to_num(99), wanted.nan_to_num(99))


def test_write_kv_takes_any_strides(rng) -> None:
    kv = torch.zeros(4, 2, 2, 16, 8)
    wanted, found = kv.clone(), on_device(kv)
    k = torch.randn(8, 2, 20).permute(2, 1, 0)
    v = torch.randn(20, 2, 16)[:, :, ::2]
    slots = torch.arange(40)[::2]
    copies.write_kv(found, on_device(k), on_device(v), on_device(slots))
    reference.write_kv(wanted, k, v, slots)
    assert torch.equal(found.cpu(), wanted)


def test_slots_outside_touch_nothing() -> None:
    """What cannot be raised from a GPU must not hit another's memory either."""
    pool = torch.zeros(6, 2, 1, 16, 8)
    found = on_device(pool)
    rows = torch.ones(3, 1, 8, device=DEVICE)
    copies.write_kv(found[:4], rows, rows, torch.tensor([64, -5, 63], device=DEVICE))
    assert found.cpu().sum() == 16 and found[3, :, 0, 15].all()


def test_write_kv_of_no_tokens() -> None:
    kv = torch.zeros(1, 2, 2, 16, 8, device=DEVICE)
    rows = torch.ones(0, 2, 8, device=DEVICE)
    copies.write_kv(kv, rows, rows, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert not kv.any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_arrive_and_nothing_else_changes(data: st.DataObject) -> None:
    """Gather, scatter, both or neither, over any row size, gap, alignment and program count."""
    draw = data.draw
    num_bytes = draw(st.sampled_from([1, 6, 8, 40, 64, 1000, 4096, 40_000]), "num_bytes")
    source, target = (
        random_bytes(*(draw(st.integers(1, 9)), num_bytes), *(draw(st.sampled_from([0, 1, 8, 96])),
                     draw(st.sampled_from([0, 2, 8]))))
        for _ in range(2)
    )  # fmt: skip
    num_rows = draw(st.integers(0, min(len(source), len(target))), "num_rows")
    ids = [
        draw(st.none() | st.permutations(range(len(table))).map(lambda p: p[:num_rows]))
        for table in (source, target)
    ]
    froms, tos = (torch.tensor(range(num_rows) if x is None else x).long() for x in ids)
    before, wanted = source.clone(), target._base.clone().as_strided(
        target.shape, target.stride(), target.storage_offset()
    )  # fmt: skip
    reference.copy_rows(source, froms, wanted, tos)
    device_source, device_target = on_device(source), on_device(target)
    copies.copy_rows(
        device_source,
        None if ids[0] is None else froms.to(DEVICE),
        device_target,
        None if ids[1] is None else tos.to(DEVICE),
        num_rows,
        num_programs=draw(st.integers(1, 5), "num_programs"),
    )
    assert torch.equal(device_source.cpu(), before)
    assert torch.equal(device_target._base.cpu(), wanted._base)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 4), st.data())
def test_copy_on_write(num_blocks: int, num_heads: int, data: st.DataObject) -> None:
    """Inside one pool: sources stay, destinations become equal to them, others stay."""
    pool = torch.randn(num_blocks, 2, 2, num_heads, 16, 8).bfloat16()
    ids = data.draw(st.permutations(range(num_blocks)))
    count = data.draw(st.integers(1, num_blocks - 1))
    targets = torch.tensor(ids[:count])
    sources = torch.tensor([data.draw(st.sampled_from(ids[count:])) for _ in range(count)])
    wanted = pool.clone()
    reference.copy_blocks(wanted, sources, targets, 16)
    found = on_device(pool)
    rows = found.view(num_blocks, -1).view(torch.uint8)
    copies.copy_rows(rows, sources.to(DEVICE), rows, targets.to(DEVICE), count, 3)
    assert torch.equal(found.cpu(), wanted)


def test_rows_past_four_gigabytes() -> None:
    """Pages that nothing touches cost no memory."""
    num_bytes = 1 << 20
    table = torch.empty((1 << 12) + 2, num_bytes, dtype=torch.uint8, device=DEVICE)
    row = torch.randint(0, 256, (1, num_bytes), dtype=torch.uint8).to(DEVICE)
    last = torch.tensor([len(table) - 1], device=DEVICE)
    copies.copy_rows(row, None, table, last, 1, 2)
    back = torch.empty_like(row)
    copies.copy_rows(table, last, back, None, 1, 2)
    assert torch.equal(back, row)


def test_slots_past_two_to_the_31() -> None:
    num_blocks = 2**31 // (2 * 16 * 64) + 2
    kv = torch.empty(num_blocks, 2, 1, 16, 64, dtype=torch.float16, device=DEVICE)
    k, v = torch.randn(2, 16, 1, 64).half().to(DEVICE)
    copies.write_kv(kv, k, v, torch.arange(16, device=DEVICE) + (num_blocks - 1) * 16)
    assert torch.equal(kv[-1, 0, 0], k[:, 0]) and torch.equal(kv[-1, 1, 0], v[:, 0])
