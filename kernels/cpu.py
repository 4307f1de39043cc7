"""CPU kernels: picks the implementation of each op.

`torch` is always there; `native` is a C library compiled on first use, in seconds, where the
machine has a compiler. `auto`, the default, takes the native one where it can be had. Native
falls back to torch op by op for what it does not cover (fp16, odd head dims).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tierkv.kernels import cpu_native, cpu_torch, reference
from tierkv.kernels.metadata import AttentionMetadata

_CHOICES = ("auto", "torch", "native")
_choice = "auto"


def set_backend(name: str) -> None:
    """Choose the CPU implementation for this process: "auto", "torch" or "native".

    Raises:
        ValueError: name is none of these.
        RuntimeError: "native" was asked for and cannot be built here; the log says why.
    """
    global _choice
    if name not in _CHOICES:
        raise ValueError(f"backend {name!r} must be one of {', '.join(_CHOICES)}")
    if name == "native" and cpu_native.library() is None:
        raise RuntimeError("backend 'native' needs a C compiler that works; use 'auto' or 'torch'")
    _choice = name


def get_backend() -> str:
    """The implementation in use, "torch" or "native"; compiles the latter if that is still due."""
    return "torch" if _library() is None else "native"


def write_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `ops.write_kv`."""
    lib = _library()
    if lib is None:
        cpu_torch.write_kv(kv, k, v, slot_mapping)
    else:
        cpu_native.write_kv(lib, kv, k, v, slot_mapping)


def copy_blocks(pool: Tensor, src_ids: Tensor, dst_ids: Tensor, num_tokens: int) -> None:
    """See `ops.copy_blocks`."""
    cpu_torch.copy_blocks(pool, src_ids, dst_ids, num_tokens)


def copy_rows(source: Tensor, src_ids: Tensor, destination: Tensor, dst_ids: Tensor) -> None:
    """See `ops.copy_rows`."""
    lib = _library()
    if lib is None:
        cpu_torch.copy_rows(source, src_ids, destination, dst_ids)
    else:
        cpu_native.copy_rows(lib, source, src_ids, destination, dst_ids)


def gather_blocks(pool: Tensor, ids: Tensor, staging: Tensor, num_programs: int) -> None:
    """See `ops.gather_blocks`."""
    copy_rows(pool, ids, staging, torch.arange(len(ids)))


def scatter_blocks(staging: Tensor, pool: Tensor, ids: Tensor, num_programs: int) -> None:
    """See `ops.scatter_blocks`."""
    copy_rows(staging, torch.arange(len(ids)), pool, ids)


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
    lib = _library()
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    if lib is None or not cpu_native.supports(kv):
        cpu_torch.attention(q, kv, meta, out, lse, **options)  # type: ignore[arg-type]
    else:
        cpu_native.attention(lib, q, kv, meta, out, lse, **options)  # type: ignore[arg-type]


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ops.merge_attention`."""
    return cpu_torch.merge_attention(outs, lses, sinks)


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """See `ops.rms_norm`."""
    lib = _library()
    if lib is None or x.dtype not in cpu_native.DTYPES:
        return cpu_torch.rms_norm(x, weight, eps, round_first)
    return cpu_native.rms_norm(lib, x, weight, eps, round_first)


def act_and_mul(x: Tensor, activation: str) -> Tensor:
    """See `ops.act_and_mul`."""
    lib = _library()
    if lib is None or x.dtype not in cpu_native.DTYPES:
        return cpu_torch.act_and_mul(x, activation)
    return cpu_native.act_and_mul(lib, x, activation)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.rotate`."""
    lib = _library()
    if lib is None or q.dtype not in cpu_native.DTYPES:
        return cpu_torch.rotate(q, k, cos, sin)
    return cpu_native.rotate(lib, q, k, cos, sin)


def widen_nuclei(
    logits: Tensor, best: Tensor, mass: Tensor, is_open: Tensor, floor: Tensor
) -> None:
    """See `ops.widen_nuclei`; for a CPU, where nobody asks, the oracle does."""
    reference.widen_nuclei(logits, best, mass, is_open, floor)


def _library() -> ctypes.CDLL | None:
    """The C kernels, unless they were ruled out or cannot be built."""
    return None if _choice == "torch" else cpu_native.library()
