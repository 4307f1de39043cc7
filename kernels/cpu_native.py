"""CPU kernels in C: ctypes over the library that `native_build` compiles.

Calls release the GIL. fp32 and bf16 with a head_dim that is a multiple of 16 run in C; the rest
is for `cpu_torch`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from tierkv.kernels import native_build, reference
from tierkv.kernels.metadata import AttentionMetadata, build_metadata

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)

_POINTERS = "q kv out lse sinks query_start context_lens key_start key_lens block_tables"
_COUNTS = (
    "table_stride num_seqs num_heads num_kv_heads head_dim block_size "
    "q_stride_token q_stride_head kv_stride_block window"
)
_ROTARY_COUNTS = "q_heads k_heads q_token k_token q_head k_head tokens dim table_stride"


class _Args(Structure):
    """The C side's `Args` (native/step.h); strides count elements."""

    _fields_ = [
        *((name, c_void_p) for name in _POINTERS.split()),
        *((name, c_int64) for name in _COUNTS.split()),
        ("scale", c_float),
        ("softcap", c_float),
        ("kv_bf16", c_int32),
        ("out_bf16", c_int32),
        ("num_threads", c_int32),
    ]


class _Rotary(Structure):
    """The C side's `Rotary` (native/row_ops.c); strides count elements."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "cos", "sin", "q_out", "k_out")),
        *((name, c_int64) for name in _ROTARY_COUNTS.split()),
        ("bf16", c_int32),
        ("num_threads", c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built and tried out on the first call; None where there are none."""
    lib = _load()
    if lib is None:
        return None
    _declare(lib)
    if not _works(lib):
        logger.warning("CPU kernels in C compute wrong results here, using torch instead")
        return None
    return lib


def _load() -> ctypes.CDLL | None:
    """Build and load; a library that does not load (a damaged cache) is built once more."""
    for _ in range(2):
        path = native_build.build_library()
        if path is None:
            return None
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            path.unlink(missing_ok=True)
            reason = error
    logger.warning("CPU kernels in C do not load, using torch instead: %s", reason)
    return None


def _declare(lib: ctypes.CDLL) -> None:
    """Tell ctypes the argument types."""
    lib.tierkv_attention.argtypes = [POINTER(_Args)]
    lib.tierkv_write_kv.argtypes = [c_void_p] * 4 + [c_int64] * 6 + [c_void_p, c_int32]
    lib.tierkv_copy_rows.argtypes = [c_void_p] * 4 + [c_int64] * 6
    lib.tierkv_rms_norm.argtypes = [c_void_p] * 3 + [c_int64] * 3 + [c_float] + [c_int32] * 3
    lib.tierkv_act_and_mul.argtypes = [c_void_p] * 2 + [c_int64] * 3 + [c_int32] * 3
    lib.tierkv_rotate.argtypes = [POINTER(_Rotary)]
    lib.tierkv_rotate.restype = None
    lib.tierkv_rms_norm.restype = lib.tierkv_act_and_mul.restype = None


def supports(kv: Tensor) -> bool:
    """Can the C attention read this KV?"""
    return kv.dtype in DTYPES and kv.shape[4] % 16 == 0


def write_kv(lib: ctypes.CDLL, kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `ops.write_kv`; any dtype."""
    if k.stride(2) != 1 or v.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    slot_mapping = slot_mapping.contiguous()
    size = kv.element_size()
    num_blocks, _, heads, block_size, head_dim = kv.shape
    strides = (c_int64 * 4)(*(size * s for s in (*k.stride()[:2], *v.stride()[:2])))
    failed = lib.tierkv_write_kv(
        kv.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        slot_mapping.data_ptr(),
        k.shape[0],
        num_blocks,
        heads,
        block_size,
        head_dim * size,
        kv.stride(0) * size,
        strides,
        torch.get_num_threads(),
    )
    if failed:
        raise ValueError(f"slot_mapping has a slot outside kv's {num_blocks} x {block_size}")


def copy_rows(
    lib: ctypes.CDLL, source: Tensor, src_ids: Tensor, destination: Tensor, dst_ids: Tensor
) -> None:
    """See `ops.copy_rows`."""
    src_ids, dst_ids = src_ids.contiguous(), dst_ids.contiguous()
    failed = lib.tierkv_copy_rows(
        destination.data_ptr(),
        source.data_ptr(),
        dst_ids.data_ptr(),
        src_ids.data_ptr(),
        src_ids.numel(),
        source.shape[1],
        destination.stride(0),
        source.stride(0),
        destination.shape[0],
        source.shape[0],
    )
    if failed:
        rows = f"{source.shape[0]} rows of source, {destination.shape[0]} of destination"
        raise IndexError(f"src_ids or dst_ids has an id outside the {rows}")


def attention(
    lib: ctypes.CDLL,
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
    args = _Args(
        q.data_ptr(),
        kv.data_ptr(),
        out.data_ptr(),
        lse.data_ptr() if lse is not None else None,
        sinks.data_ptr() if sinks is not None else None,
        *_meta_fields(meta),
    )
    args.num_heads, args.num_kv_heads, args.head_dim = q.shape[1], kv.shape[2], kv.shape[4]
    args.block_size = meta.block_size
    args.q_stride_token, args.q_stride_head = q.stride(0), q.stride(1)
    args.kv_stride_block = kv.stride(0)
    args.window, args.scale, args.softcap = window or 0, scale, softcap or 0.0
    args.kv_bf16 = kv.dtype == torch.bfloat16
    args.out_bf16 = out.dtype == torch.bfloat16
    args.num_threads = torch.get_num_threads()
    if lib.tierkv_attention(byref(args)):
        raise MemoryError("paged attention: no memory for its scratch space")


def rms_norm(lib: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """See `ops.rms_norm`."""
    x, stride = _rows(x)
    dim = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    lib.tierkv_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        out.numel() // dim,
        dim,
        stride,
        eps,
        x.dtype == torch.bfloat16,
        round_first,
        torch.get_num_threads(),
    )
    return out


def act_and_mul(lib: ctypes.CDLL, x: Tensor, activation: str) -> Tensor:
    """See `ops.act_and_mul`."""
    x, stride = _rows(x)
    dim = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], dim))
    lib.tierkv_act_and_mul(
        x.data_ptr(),
        out.data_ptr(),
        out.numel() // dim,
        dim,
        stride,
        x.dtype == torch.bfloat16,
        activation != "silu",
        torch.get_num_threads(),
    )
    return out


def rotate(
    lib: ctypes.CDLL, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """See `ops.rotate`."""
    if q.stride(2) != 1 or k.stride(2) != 1:
        q, k = q.contiguous(), k.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    (heads, tokens, dim), num_kv_heads = q.shape, k.shape[0]
    q_out = q.new_empty_strided(q.shape, (dim, heads * dim, 1))
    k_out = q.new_empty_strided(k.shape, (dim, num_kv_heads * dim, 1))
    (q_head, q_token, _), (k_head, k_token, _) = q.stride(), k.stride()
    args = _Rotary(
        q.data_ptr(),
        k.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        q_out.data_ptr(),
        k_out.data_ptr(),
        *(heads, num_kv_heads, q_token, k_token, q_head, k_head, tokens, dim, dim),
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    lib.tierkv_rotate(byref(args))
    return q_out, k_out


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as evenly spaced rows, copied if it has to be, and the distance between rows."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 and x.shape[:-2].numel() == 1:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


def _meta_fields(meta: AttentionMetadata) -> tuple[int, ...]:
    """Pointers into the step's tensors, the table's row stride and the number of sequences."""
    fields: tuple[int, ...] | None = meta.plans.get("native")
    if fields is None:
        tensors = (meta.query_start, meta.context_lens, meta.key_start, meta.key_lens)
        pointers = [tensor.data_ptr() for tensor in (*tensors, meta.block_tables)]
        fields = meta.plans["native"] = (*pointers, meta.block_tables.stride(0), meta.num_seqs)
    return fields


def _works(lib: ctypes.CDLL) -> bool:
    """Do the row ops and a step with decode row and prefill chunk come out as in the reference?"""
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(6, 2, 2, 16, 32, generator=generator)
    q = torch.randn(21, 4, 32, generator=generator)
    meta = build_metadata([1, 20], [37, 45], [[0, 4, 2], [1, 3, 5]], 16)
    out = torch.empty_like(q)
    attention(lib, q, kv, meta, out, None, scale=0.2, window=30)
    pairs = [(out, reference.paged_attention(q, kv, meta, scale=0.2, window=30))]
    weight = torch.ones(32)
    pairs.append(
        (rms_norm(lib, q, weight, 1.0, True), reference.rms_norm(q, weight, 1.0, round_first=True))
    )
    heads, (cos, sin) = q.transpose(0, 1), torch.randn(2, 21, 32, generator=generator)
    pairs += zip(
        rotate(lib, heads, heads[:2], cos, sin),
        reference.rotate(heads, heads[:2], cos, sin),
        strict=True,
    )
    for activation in ("silu", "gelu_tanh"):
        wanted = reference.act_and_mul(q, activation)
        pairs.append((act_and_mul(lib, q, activation), wanted))
    return all(torch.allclose(*pair, atol=1e-4, rtol=1e-4) for pair in pairs)
