"""How near to the hardware's limits is paged attention, and beside it attention without pages?

    decode    64 sequences of 8,192 tokens, 32 heads on 8 KV heads of 128: bytes of K and V read
              over the time, as a share of the copy bandwidth
    prefill   8,192 tokens, causal: operations over the time, as a share of the bf16 matrix rate
    layout    decode over `pool[:, layer]` against the same data in a pool of its own

Peers compute the same on contiguous K and V: torch's SDPA, FlexAttention, FlashInfer where it is
installed. Layers take turns, so that no layer's keys are in the L2 cache from the call before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpu.setup import Row, Rows, Setup, plain_row, share, shown, target_row, tried
from tierkv.kernels import ops
from tierkv.kernels.metadata import AttentionMetadata, build_metadata

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
LAYERS = 4
BLOCK_SIZES = (16, 64, 256)


# ---------------------------------------------------------------------- decode


def decode(setup: Setup) -> dict[str, Any]:
    """GB/s by block size, and of peers."""
    batch, context = setup.size((64, 8192), (2, 64))
    num_bytes = batch * context * 2 * KV_HEADS * DIM * 2
    q = setup.randn(batch, HEADS, DIM)
    limit = setup.limits.get("copy_gb_per_s")
    found: dict[str, Any] = {"batch": batch, "context": context, "block_sizes": {}}
    for size in setup.size(BLOCK_SIZES, BLOCK_SIZES[:1]):
        pool, meta = paged(setup, batch, context, size)
        seconds = setup.median_s(each_layer(pool, lambda kv, m=meta: attend(q, kv, m)))
        rate = num_bytes / seconds / 1e9
        found["block_sizes"][str(size)] = {
            "us": round(seconds * 1e6, 1),
            "gb_per_s": round(rate, 1),
            "share_of_copy": share(rate, limit),
        }
        del pool
    keys, values = (setup.randn(batch, KV_HEADS, context, DIM) for _ in range(2))
    peers = decode_peers(q, keys, values)
    found["peers_gb_per_s"] = {
        name: tried(lambda run=run: round(num_bytes / setup.median_s(run) / 1e9, 1))  # type: ignore[misc]
        for name, run in peers.items()
    }
    return found


def decode_peers(q: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], object]]:
    row = q.unsqueeze(2)

    def sdpa() -> Tensor:
        return functional.scaled_dot_product_attention(row, keys, values, enable_gqa=True)

    def flex() -> object:
        return flex_attention()(row, keys, values, enable_gqa=True)

    return {"sdpa": sdpa, "flex attention": flex, "flashinfer": _flashinfer_decode(q, keys, values)}


def _flashinfer_decode(q: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object]:
    """Its paged decode with pages of 16 in order; planned once."""
    planned: list[tuple[Any, Tensor]] = []

    def run() -> object:
        if not planned:
            import flashinfer

            batch, heads, context, dim = keys.shape
            pages = torch.stack([keys, values], 2).transpose(
                1, 3
            )  # [batch, context, 2, heads, dim]
            pages = pages.reshape(batch * context // 16, 16, 2, heads, dim).transpose(1, 2)
            indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * (context // 16)
            indices = torch.arange(batch * context // 16, dtype=torch.int32, device=q.device)
            last = torch.full((batch,), 16, dtype=torch.int32, device=q.device)
            space = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD")
            wrapper.plan(
                indptr, indices, last, HEADS, heads, dim, 16, q_data_type=q.dtype,
                kv_data_type=q.dtype,
            )  # fmt: skip
            planned.append((wrapper, pages.contiguous()))
        wrapper, pages = planned[0]
        return wrapper.run(q, pages)

    return run


# ---------------------------------------------------------------------- prefill


def prefill(setup: Setup) -> dict[str, Any]:
    """TFLOP/s of a whole prompt, of a chunk behind a long context, and of peers."""
    length = setup.size(8192, 64)
    limit = setup.limits.get("matmul_tflop_per_s")
    found: dict[str, Any] = {"length": length}
    chunk = setup.size(2048, 16)
    for name, new in (("whole", length), ("chunk", chunk)):
        pool, meta = paged(setup, 1, length, 16, new)
        q = setup.randn(new, HEADS, DIM)
        seconds = setup.median_s(each_layer(pool, lambda kv, q=q, m=meta: attend(q, kv, m)))
        rate = operations(new, length) / seconds / 1e12
        found[name] = {
            "new": new,
            "ms": round(seconds * 1e3, 3),
            "tflop_per_s": round(rate, 1),
            "share_of_matmul": share(rate, limit),
        }
    q = setup.randn(1, HEADS, length, DIM)
    keys, values = (setup.randn(1, KV_HEADS, length, DIM) for _ in range(2))
    found["peers_tflop_per_s"] = {
        name: tried(
            lambda run=run: round(operations(length, length) / setup.median_s(run) / 1e12, 1)
        )  # type: ignore[misc]
        for name, run in prefill_peers(q, keys, values).items()
    }
    return found


def operations(new: int, length: int) -> int:
    """Multiplications and additions of both products, over the keys that rows may see."""
    seen = sum(range(length - new + 1, length + 1))
    return 4 * HEADS * DIM * seen


def prefill_peers(q: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], object]]:
    masks: list[Any] = []

    def sdpa() -> Tensor:
        return functional.scaled_dot_product_attention(
            q, keys, values, is_causal=True, enable_gqa=True
        )

    def flex() -> object:
        if not masks:
            from torch.nn.attention.flex_attention import create_block_mask

            length = q.shape[2]
            masks.append(
                create_block_mask(_causal, None, None, length, length, device=str(q.device))
            )
        return flex_attention()(q, keys, values, block_mask=masks[0], enable_gqa=True)

    def flashinfer_prefill() -> object:
        import flashinfer

        rows = [x[0].transpose(0, 1).contiguous() for x in (q, keys, values)]
        return flashinfer.single_prefill_with_kv_cache(*rows, causal=True)

    return {"sdpa": sdpa, "flex attention": flex, "flashinfer": flashinfer_prefill}


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


_compiled: list[Callable[..., object]] = []


def flex_attention() -> Callable[..., object]:
    """FlexAttention, compiled once: without that it is no peer."""
    if not _compiled:
        from torch.nn.attention.flex_attention import flex_attention as plain

        _compiled.append(torch.compile(plain))
    return _compiled[0]


# ---------------------------------------------------------------------- layout


def layout(setup: Setup) -> dict[str, Any]:
    """Microseconds of decode over a strided layer and over a layer of its own, block by block."""
    batch, context = setup.size((64, 8192), (2, 64))
    q = setup.randn(batch, HEADS, DIM)
    found: dict[str, Any] = {}
    for size in setup.size(BLOCK_SIZES, BLOCK_SIZES[:1]):
        pool, meta = paged(setup, batch, context, size)
        major = pool.transpose(0, 1).contiguous().transpose(0, 1)
        run = lambda kv, m=meta: attend(q, kv, m)  # noqa: E731
        times = [setup.median_s(each_layer(p, run)) for p in (pool, major, major, pool)]
        block_major, layer_major = times[0] + times[3], times[1] + times[2]
        found[str(size)] = {
            "block_major_us": round(block_major * 5e5, 1),
            "layer_major_us": round(layer_major * 5e5, 1),
            "cost": round(block_major / layer_major - 1, 4),
        }
        del pool, major
    return found


# ---------------------------------------------------------------------- shared


def paged(
    setup: Setup, batch: int, context: int, block_size: int, new: int = 1
) -> tuple[Tensor, AttentionMetadata]:
    """A pool of random blocks, and a step over sequences whose blocks lie in it at random."""
    per_sequence = -(-context // block_size)
    total = batch * per_sequence
    pool = setup.randn(total, LAYERS, 2, KV_HEADS, block_size, DIM)
    ids = random.Random(0).sample(range(total), total)
    tables = [ids[i * per_sequence : (i + 1) * per_sequence] for i in range(batch)]
    meta = build_metadata([new] * batch, [context] * batch, tables, block_size, device=setup.device)
    return pool, meta


def each_layer(pool: Tensor, run: Callable[[Tensor], object]) -> Callable[[], object]:
    """The same on another layer each time."""
    numbers = count()
    return lambda: run(pool[:, next(numbers) % LAYERS])


def attend(q: Tensor, kv: Tensor, meta: AttentionMetadata) -> Tensor:
    return ops.paged_attention(q, kv, meta, scale=SCALE)


# ---------------------------------------------------------------------- rows


def decode_rows(found: dict[str, Any]) -> Rows:
    work = f"decode, {found['batch']} x {found['context']}"
    for size, entry in found["block_sizes"].items():
        yield plain_row(f"{work}, blocks of {size}", entry["gb_per_s"], "GB/s")
        yield target_row(f"{work}, blocks of {size}, of copy", entry["share_of_copy"], 0.85)
    yield from _peer_rows(work, found["peers_gb_per_s"], "GB/s")


def prefill_rows(found: dict[str, Any]) -> Rows:
    for name in ("whole", "chunk"):
        entry = found[name]
        work = f"prefill, {entry['new']} of {found['length']}"
        yield plain_row(work, entry["tflop_per_s"], "TFLOP/s")
        yield target_row(f"{work}, of matrix rate", entry["share_of_matmul"], 0.6)
    yield from _peer_rows("prefill", found["peers_tflop_per_s"], "TFLOP/s")


def _peer_rows(work: str, peers: dict[str, Any], unit: str) -> Rows:
    for name, rate in peers.items():
        yield f"{work}, {name} on contiguous K and V", shown(rate, unit), "", ""


def layout_rows(found: dict[str, Any]) -> Rows:
    for size, entry in found.items():
        row: Row = target_row(
            f"decode, cost of the block-major layout, blocks of {size}", entry["cost"], 0.03,
            at_most=True,
        )  # fmt: skip
        yield row
