"""The kernels' public face: each op checked, then handed to the device's implementation.

A wrapper raises `TypeError` for a wrong dtype and `ValueError` for a wrong shape, stride or device,
naming the argument. What it cannot check without reading a tensor (that a block id or slot is the
caller's to use) is the caller's contract.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tierkv.kernels import cpu
from tierkv.kernels.metadata import AttentionMetadata

set_backend = cpu.set_backend
get_backend = cpu.get_backend

ACTIVATIONS = ("silu", "gelu_tanh")

DEVICES = ("cpu", "cuda")
"""Types of devices that have kernels."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def write_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Store row `i`'s key and value in slot `slot_mapping[i]` of one layer.

    Args:
        kv: `[num_blocks, 2, num_kv_heads, block_size, head_dim]`, written in place; the blocks may
            be strided (`pool[:, layer]`), what is inside one is contiguous.
        k: `[num_tokens, num_kv_heads, head_dim]` of kv's dtype, any strides.
        v: the same shape as k.
        slot_mapping: int64 `[num_tokens]`, `block * block_size + offset`; a negative slot drops
            the row. No two rows share a slot.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device; on a CPU,
            also if a slot lies outside kv. On a GPU, where nobody waits for that, such a slot
            drops the row.
    """
    _check_kv(kv)
    rows = (k.shape[0], kv.shape[2], kv.shape[4])
    if v.shape != k.shape:
        raise ValueError(f"v has shape {list(v.shape)}, k {list(k.shape)}; they must be equal")
    _check(k, "k", rows, kv.dtype, kv)
    _check(v, "v", rows, kv.dtype, kv)
    _check(slot_mapping, "slot_mapping", rows[:1], torch.int64, kv)
    _of(kv).write_kv(kv, k, v, slot_mapping)


def copy_blocks(pool: Tensor, src_ids: Tensor, dst_ids: Tensor, num_tokens: int) -> None:
    """Copy the first `num_tokens` tokens of block `src_ids[i]` to block `dst_ids[i]`, all layers.

    This is copy-on-write: destinations are distinct, and none is also a source.

    Args:
        pool: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, contiguous.
        src_ids: int64 `[n]`.
        dst_ids: int64 `[n]`.
        num_tokens: tokens that must arrive, 1 to block_size; the rest is unspecified.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.
        IndexError: a block id lies outside the pool (on a CPU; on a GPU nobody looks).
    """
    if pool.dim() != 6 or not pool.is_contiguous():
        raise ValueError(f"pool must be contiguous with 6 dimensions, got {_layout(pool)}")
    _check_device(pool, "pool")
    _check(src_ids, "src_ids", (src_ids.numel(),), torch.int64, pool)
    _check(dst_ids, "dst_ids", tuple(src_ids.shape), torch.int64, pool)
    if not 1 <= num_tokens <= pool.shape[4]:
        raise ValueError(f"num_tokens={num_tokens} must be in 1..block_size={pool.shape[4]}")
    _of(pool).copy_blocks(pool, src_ids, dst_ids, num_tokens)


def copy_rows(source: Tensor, src_ids: Tensor, destination: Tensor, dst_ids: Tensor) -> None:
    """Row `dst_ids[i]` of `destination` becomes row `src_ids[i]` of `source`.

    Any number of rows is one call. On a CPU it does not hold the interpreter lock, runs in the
    calling thread alone, and copies runs of neighbours (on both sides) at once where rows have no
    gaps. On a GPU it is one asynchronous launch.

    Args:
        source: uint8 `[num_rows, num_bytes]`; rows may have gaps, what is inside one is contiguous.
        src_ids: int64 `[n]`.
        destination: uint8, rows of the same size in other memory of the same device.
        dst_ids: int64 `[n]`, distinct.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.
        IndexError: an id names no row (on a CPU; on a GPU nobody looks).
    """
    _check_bytes(source, "source")
    _check_bytes(destination, "destination")
    if source.shape[1] != destination.shape[1]:
        sizes = f"{destination.shape[1]} bytes, those of source {source.shape[1]}"
        raise ValueError(f"destination has rows of {sizes}")
    if destination.device != source.device:
        raise ValueError(f"destination is on {destination.device}, expected {source.device}")
    _check(src_ids, "src_ids", (src_ids.numel(),), torch.int64, source)
    _check(dst_ids, "dst_ids", tuple(src_ids.shape), torch.int64, source)
    _of(source).copy_rows(source, src_ids, destination, dst_ids)


def gather_blocks(pool: Tensor, ids: Tensor, staging: Tensor, *, num_programs: int = 8) -> None:
    """Row `i` of `staging` becomes row `ids[i]` of `pool`: many small blocks side by side.

    On a GPU it is one asynchronous launch on the current stream. The staging memory is the GPU's,
    or pinned memory of the host, which it then writes through the bus.

    Args:
        pool: uint8 `[num_blocks, block_bytes]`; blocks may have gaps.
        ids: int64 `[n]`, on pool's device.
        staging: uint8 `[n or more, block_bytes]`, on pool's device or pinned.
        num_programs: thread blocks that may run at once on a GPU; few leave it to other work.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.
        IndexError: an id names no block (on a CPU; on a GPU nobody looks).
    """
    _check_staging(pool, ids, staging, num_programs)
    _of(pool).gather_blocks(pool, ids, staging, num_programs)


def scatter_blocks(staging: Tensor, pool: Tensor, ids: Tensor, *, num_programs: int = 8) -> None:
    """Row `ids[i]` of `pool` becomes row `i` of `staging`: the reverse of `gather_blocks`.

    Args, Raises: as there; ids are distinct.
    """
    _check_staging(pool, ids, staging, num_programs)
    _of(pool).scatter_blocks(staging, pool, ids, num_programs)


def paged_attention(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of every row of a step, prefill chunks and decode rows alike.

    The keys and values of the step's own tokens are in kv already.

    Args:
        q: `[num_tokens, num_heads, head_dim]` of kv's dtype; the last dimension is contiguous.
        kv: `[num_blocks, 2, num_kv_heads, block_size, head_dim]`; head h reads KV head
            `h // (num_heads // num_kv_heads)`.
        meta: the step, from `build_metadata`.
        scale: factor on the scores, positive.
        window: a row at position p sees keys with `p - window < position <= p`.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: `[num_heads]`, logits of one more softmax column without a value (gpt-oss).
        out: `[num_tokens, num_heads, head_dim]` of q's dtype, contiguous; allocated if None.

    Returns:
        out. A row that sees no key gets zeros.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device, or meta
            names blocks outside kv.
    """
    _check_attention(q, kv, meta, scale, window, softcap)
    if sinks is not None:
        sinks = _check_sinks(sinks, q)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        _check(out, "out", tuple(q.shape), q.dtype, q)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got {_layout(out)}")
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    _of(kv).attention(q, kv, meta, out, None, **options)
    return out


def partial_attention(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the segment meta's block tables hold, to be merged with other segments.

    Args: as in `paged_attention`; sinks belong to the merge.

    Returns:
        `(out, lse)`, fp32 `[num_tokens, num_heads, head_dim]` and `[num_tokens, num_heads]`; lse
        is the natural log of the sum of exponentials. A row that sees no key of the segment has
        out 0 and lse -inf.

    Raises:
        TypeError, ValueError: as `paged_attention`.
    """
    _check_attention(q, kv, meta, scale, window, softcap)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _of(kv).attention(q, kv, meta, out, lse, scale=scale, window=window, softcap=softcap)
    return out, lse


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Combine partial results over disjoint sets of keys into the result over their union.

    Args:
        outs: each `[num_tokens, num_heads, head_dim]`, any one float dtype.
        lses: each fp32 `[num_tokens, num_heads]`.
        sinks: `[num_heads]` sink logits, counted once.

    Returns:
        `(out, lse)` of the union, fp32; lse includes the sinks.

    Raises:
        TypeError, ValueError: nothing to merge, or dtypes or shapes that do not match.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses has {len(lses)} entries for {len(outs)} outs (at least 1)")
    shape = tuple(outs[0].shape)
    if len(shape) != 3:
        raise ValueError(f"outs[0] must have 3 dimensions, got {_layout(outs[0])}")
    for index, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        _check(part, f"outs[{index}]", shape, outs[0].dtype, outs[0])
        _check(lse, f"lses[{index}]", shape[:2], torch.float32, outs[0])
    if sinks is not None:
        sinks = _check_sinks(sinks, outs[0])
    merged: tuple[Tensor, Tensor] = _of(outs[0]).merge_attention(outs, lses, sinks)
    return merged


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, round_first: bool) -> Tensor:
    """Scale every row to a root mean square of 1, then elementwise by weight, in fp32.

    Args:
        x: `[..., dim]`, any strides; rows that are evenly spaced are not copied.
        weight: fp32 `[dim]`, contiguous.
        eps: added to the mean square.
        round_first: round to x's dtype before weight is applied, as well as after.

    Returns:
        `[..., dim]` of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.
    """
    _check_rows(x)
    _check(weight, "weight", tuple(x.shape[-1:]), torch.float32, x)
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got {_layout(weight)}")
    normed: Tensor = _of(x).rms_norm(x, weight, eps, round_first)
    return normed


def act_and_mul(x: Tensor, activation: str) -> Tensor:
    """The activation of a row's first half times its second half.

    Args:
        x: `[..., 2 * dim]`, any strides; rows that are evenly spaced are not copied.
        activation: one of `ACTIVATIONS`; its result is rounded to x's dtype.

    Returns:
        `[..., dim]` of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: x has the wrong dtype, shape or device; an unknown activation.
    """
    _check_rows(x)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, got {_layout(x)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
    product: Tensor = _of(x).act_and_mul(x, activation)
    return product


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding: element `i` of a head turns with element `i + head_dim // 2`.

    Args:
        q: `[num_heads, num_tokens, head_dim]`, any strides; head_dim is even.
        k: `[num_kv_heads, num_tokens, head_dim]` of q's dtype, any strides.
        cos, sin: `[num_tokens, head_dim]` of q's dtype, to which every operation rounds.

    Returns:
        The turned q and k, `[heads, num_tokens, head_dim]`.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.
    """
    _check_rows(q)
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] % 2:
        raise ValueError(f"q and k must be [heads, tokens, even dim]: {_layout(q)}, {_layout(k)}")
    _check(k, "k", (k.shape[0], *q.shape[1:]), q.dtype, q)
    _check(cos, "cos", tuple(q.shape[1:]), q.dtype, q)
    _check(sin, "sin", tuple(q.shape[1:]), q.dtype, q)
    turned: tuple[Tensor, Tensor] = _of(q).rotate(q, k, cos, sin)
    return turned


def widen_nuclei(
    logits: Tensor, best: Tensor, mass: Tensor, is_open: Tensor, floor: Tensor
) -> None:
    """Lower the floor of rows that are open to the smallest logit that top-p keeps.

    That is the smallest one such that the sum of `exp(l - best)` over the logits l above it is less
    than mass: tokens tied with the last one kept are kept. Logits of -inf have no mass and are not
    kept. Where even all logits have less than mass, the floor is the lowest fp32 number. Sums are
    fp32, so which token is the last follows from rounding where a sum comes close to mass.

    On a GPU it is one asynchronous launch, which ends at once if no row is open.

    Args:
        logits: fp32 `[rows, vocab]`; rows may have gaps, what is inside one is contiguous.
        best: fp32 `[rows]`, the largest logit of each.
        mass: fp32 `[rows]`, above 0, in units of `exp(l - best)`.
        is_open: bool `[rows]`; the floors of other rows stay.
        floor: fp32 `[rows]`, contiguous, written in place; in: numbers that are not below the
            result, such as logits known to be kept.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.
    """
    _check_rows(logits, "logits", (torch.float32,))
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous rows, got {_layout(logits)}")
    for name, x in (("best", best), ("mass", mass), ("floor", floor)):
        _check(x, name, (logits.shape[0],), torch.float32, logits)
    _check(is_open, "is_open", (logits.shape[0],), torch.bool, logits)
    if not floor.is_contiguous():
        raise ValueError(f"floor must be contiguous, got {_layout(floor)}")
    _of(logits).widen_nuclei(logits, best, mass, is_open, floor)


def _of(x: Tensor) -> Any:
    """The module with the implementations for the tensor's device."""
    return cpu if x.device.type == "cpu" else _cuda()


@functools.cache
def _cuda() -> Any:
    """The module for CUDA tensors; imports Triton, which nothing else needs.

    Raises:
        ImportError: Triton is not installed.
    """
    try:
        return importlib.import_module("tierkv.kernels.cuda")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        fix = "install it with torch's CUDA build, or by `pip install tierkv[cuda]`"
        raise ImportError(f"tensors on a GPU need Triton, which is not installed; {fix}") from None


def _check_device(x: Tensor, name: str) -> None:
    """Raise unless x is on a device that has an implementation."""
    if x.device.type not in DEVICES:
        raise ValueError(f"{name} is on {x.device}; there are kernels for {' and '.join(DEVICES)}")


def _check_rows(x: Tensor, name: str = "x", dtypes: tuple[torch.dtype, ...] = _FLOATS) -> None:
    """Raise unless x is made of rows on a device that has an implementation."""
    _check_device(x, name)
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}, expected one of {dtypes}")
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"{name} must have rows that are not empty, got {_layout(x)}")


def _check_bytes(x: Tensor, name: str) -> None:
    """Raise unless x is a table of rows of bytes on a device that has an implementation."""
    _check_device(x, name)
    if x.dtype is not torch.uint8:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {torch.uint8}")
    if x.dim() != 2 or x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        raise ValueError(f"{name} must have rows of contiguous bytes, got {_layout(x)}")


def _check_staging(pool: Tensor, ids: Tensor, staging: Tensor, num_programs: int) -> None:
    """Raise unless the arguments of gathering and scattering fit together."""
    _check_bytes(pool, "pool")
    _check_bytes(staging, "staging")
    _check(ids, "ids", (ids.numel(),), torch.int64, pool)
    if staging.shape[1] != pool.shape[1] or staging.shape[0] < len(ids):
        wanted = f"{len(ids)} rows or more of {pool.shape[1]} bytes"
        raise ValueError(f"staging has shape {list(staging.shape)}, expected {wanted}")
    if staging.device != pool.device and not (pool.is_cuda and staging.is_pinned()):
        raise ValueError(f"staging is on {staging.device}, expected {pool.device} or pinned memory")
    if num_programs < 1:
        raise ValueError(f"num_programs must be at least 1, got {num_programs}")


def _check_attention(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Raise unless the arguments that both attention ops share fit together."""
    _check_kv(kv)
    if q.dim() != 3:
        raise ValueError(f"q must be [num_tokens, num_heads, head_dim], got {_layout(q)}")
    num_heads, num_kv_heads = q.shape[1], kv.shape[2]
    _check(q, "q", (meta.num_tokens, num_heads, kv.shape[4]), kv.dtype, kv)
    if q.stride(2) != 1:
        raise ValueError(f"q must be contiguous in its last dimension, got {_layout(q)}")
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, not a multiple of kv's {num_kv_heads}")
    if meta.block_size != kv.shape[3]:
        raise ValueError(f"meta has block_size {meta.block_size}, kv {kv.shape[3]}")
    if meta.max_block_id >= kv.shape[0]:
        raise ValueError(f"meta names block {meta.max_block_id}, kv has {kv.shape[0]} blocks")
    if meta.query_start.device != kv.device:
        raise ValueError(f"meta is on {meta.query_start.device}, kv on {kv.device}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")


def _check_kv(kv: Tensor) -> None:
    """Raise unless kv is one layer's view of a pool on a device that has an implementation."""
    _check_device(kv, "kv")
    if kv.dtype not in _FLOATS:
        raise TypeError(f"kv has dtype {kv.dtype}, expected one of {_FLOATS}")
    if kv.dim() != 5 or kv.shape[1] != 2:
        raise ValueError(
            f"kv must be [num_blocks, 2, num_kv_heads, block_size, head_dim], got {_layout(kv)}"
        )
    _, _, heads, size, dim = kv.shape
    if kv.stride()[1:] != (heads * size * dim, size * dim, dim, 1):
        raise ValueError(f"kv must be contiguous inside a block, got {_layout(kv)}")


def _check_sinks(sinks: Tensor, like: Tensor) -> Tensor:
    """Check the per-head logits and return them as contiguous fp32."""
    if not sinks.is_floating_point():
        raise TypeError(f"sinks has dtype {sinks.dtype}, expected a float dtype")
    _check(sinks, "sinks", (like.shape[1],), sinks.dtype, like)
    return sinks.detach().float().contiguous()


def _check(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Raise unless x has this shape and dtype and lives where `like` does."""
    if x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}")


def _layout(x: Tensor) -> str:
    """Shape and strides for a message."""
    return f"shape {list(x.shape)} with strides {list(x.stride())}"
