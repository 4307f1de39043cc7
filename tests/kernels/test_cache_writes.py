"""Writing keys and values into blocks, and copying blocks."""

from __future__ import annotations

import pytest
import torch

from tierkv.kernels import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw_rows(num_tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a model has them: a transposed view."""
    return torch.randn(heads, num_tokens, dim).to(dtype).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("num_tokens", [1, 31, 200])
def test_write_kv(dtype, block_size, num_tokens, backend, rng) -> None:
    num_blocks = -(-num_tokens // block_size) + 3
    pool = torch.full((num_blocks, 3, 2, 2, block_size, 24), torch.nan, dtype=dtype)
    wanted = pool.clone()
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[rng.randrange(num_tokens)] = -1
    k, v = (draw_rows(num_tokens, 2, 24, dtype) for _ in range(2))
    ops.write_kv(pool[:, 1], k, v, slots)
    reference.write_kv(wanted[:, 1], k, v, slots)
    assert torch.equal(pool.nan_to_num(99), wanted.nan_to_num(99))


def test_write_kv_takes_any_strides(backend, rng) -> None:
    kv = torch.zeros(4, 2, 2, 16, 8)
    wanted = kv.clone()
    k = torch.randn(8, 2, 20).permute(2, 1, 0)
    v = torch.randn(20, 2, 16)[:, :, ::2]
    slots = torch.arange(40)[::2]
    ops.write_kv(kv, k, v, slots)
    reference.write_kv(wanted, k, v, slots)
    assert torch.equal(kv, wanted)


def test_write_kv_of_no_tokens(backend) -> None:
    kv = torch.zeros(4, 2, 2, 16, 8)
    ops.write_kv(kv, *torch.randn(2, 0, 2, 8), torch.empty(0, dtype=torch.int64))
    assert not kv.any()


def test_write_kv_refuses_slots_outside(backend) -> None:
    kv = torch.zeros(4, 2, 2, 16, 8)
    with pytest.raises(ValueError, match="slot_mapping"):
        ops.write_kv(kv, *torch.randn(2, 1, 2, 8), torch.tensor([64]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_blocks(dtype, rng) -> None:
    pool = torch.randn(9, 3, 2, 2, 16, 8).to(dtype)
    before, wanted = pool.clone(), pool.clone()
    ids = torch.randperm(9)
    src, dst = ids[[0, 0, 1]], ids[2:5]
    ops.copy_blocks(pool, src, dst, 5)
    reference.copy_blocks(wanted, src, dst, 5)
    assert torch.equal(pool[..., :5, :], wanted[..., :5, :])
    others = [i for i in range(9) if i not in dst.tolist()]
    assert torch.equal(pool[others], before[others])


def test_copy_blocks_refuses_blocks_outside() -> None:
    pool = torch.zeros(3, 1, 2, 1, 16, 8)
    with pytest.raises(IndexError):
        ops.copy_blocks(pool, torch.tensor([3]), torch.tensor([0]), 1)
    with pytest.raises(IndexError):
        ops.copy_blocks(pool, torch.tensor([0]), torch.tensor([3]), 1)
