"""CUDA kernels: picks the implementation of each op.

All of them are Triton's; here they get the GPU on which they are launched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tierkv.kernels.metadata import AttentionMetadata
from tierkv.kernels.triton import attention as triton_attention
from tierkv.kernels.triton import copies, merge, nucleus, rows
from tierkv.kernels.triton.tiles import Device

_PROGRAMS_PER_SM = 4  # of a copy that has the GPU to itself


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """See `ops.rms_norm`."""
    with _launching_on(x):
        return rows.rms_norm(x, weight, eps, round_first)


def act_and_mul(x: Tensor, activation: str) -> Tensor:
    """See `ops.act_and_mul`."""
    with _launching_on(x):
        return rows.act_and_mul(x, activation)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.rotate`."""
    with _launching_on(q):
        return rows.rotate(q, k, cos, sin)


def write_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `ops.write_kv`."""
    with _launching_on(kv):
        copies.write_kv(kv, k, v, slot_mapping)


def copy_blocks(pool: Tensor, src_ids: Tensor, dst_ids: Tensor, num_tokens: int) -> None:
    """See `ops.copy_blocks`; whole blocks, because one contiguous range copies fastest."""
    rows = pool.view(pool.shape[0], -1).view(torch.uint8)
    copy_rows(rows, src_ids, rows, dst_ids)


def copy_rows(source: Tensor, src_ids: Tensor, destination: Tensor, dst_ids: Tensor) -> None:
    """See `ops.copy_rows`."""
    with _launching_on(source):
        num_programs = _PROGRAMS_PER_SM * _device(source.device).num_sms
        copies.copy_rows(source, src_ids, destination, dst_ids, len(src_ids), num_programs)


def gather_blocks(pool: Tensor, ids: Tensor, staging: Tensor, num_programs: int) -> None:
    """See `ops.gather_blocks`."""
    with _launching_on(pool):
        copies.copy_rows(pool, ids, staging, None, len(ids), num_programs)


def scatter_blocks(staging: Tensor, pool: Tensor, ids: Tensor, num_programs: int) -> None:
    """See `ops.scatter_blocks`."""
    with _launching_on(pool):
        copies.copy_rows(staging, None, pool, ids, len(ids), num_programs)


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
    with _launching_on(kv):
        triton_attention.attention(
            q,
            kv,
            meta,
            out,
            lse,
            _device(kv.device),
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ops.merge_attention`."""
    with _launching_on(outs[0]):
        return merge.merge_attention(outs, lses, sinks)


def widen_nuclei(
    logits: Tensor, best: Tensor, mass: Tensor, is_open: Tensor, floor: Tensor
) -> None:
    """See `ops.widen_nuclei`."""
    with _launching_on(logits):
        nucleus.widen_nuclei(logits, best, mass, is_open, floor)


def _launching_on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def _device(device: torch.device) -> Device:
    """What launches need to know of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, (properties.major, properties.minor))
