"""Does every kernel compute what the fp32 oracle computes, on this device?

Fresh random inputs; outputs hold NaN before. The error is ||out - reference|| / ||reference||.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gpu.setup import Rows, Setup
from tierkv.kernels import ops, reference
from tierkv.kernels.metadata import build_metadata

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@dataclass(slots=True, frozen=True)
class Shape:
    """One attention to check: heads, sizes, what the layer adds."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def name(self) -> str:
        extras = [f"window {self.window}"] if self.window else []
        extras += ["softcap"] if self.softcap else []
        extras += ["sinks"] if self.has_sinks else []
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"{self.num_heads}/{self.num_kv_heads} heads x {self.head_dim}"
        return ", ".join([heads, f"blocks of {self.block_size}", dtype, *extras])


def shapes() -> list[Shape]:
    """Ratios, head dims, block sizes, dtypes and extras, each with each other somewhere."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    return [
        Shape(32, 8, 128, 16, bf16),
        Shape(32, 8, 128, 64, bf16, window=100),
        Shape(32, 32, 128, 256, f16),
        Shape(8, 1, 256, 16, bf16, softcap=30.0),
        Shape(8, 4, 256, 32, f32, window=64, softcap=50.0),
        Shape(71, 1, 64, 16, bf16),
        Shape(12, 12, 64, 16, f32),
        Shape(12, 12, 64, 128, f16),
        Shape(32, 32, 80, 16, bf16),
        Shape(32, 4, 96, 32, f32),
        Shape(64, 8, 64, 16, bf16, window=128, has_sinks=True),
        Shape(16, 2, 128, 16, f32, has_sinks=True),
    ]


def run(setup: Setup) -> dict[str, Any]:
    """The error of each case, and those that are too large."""
    rng = random.Random(torch.seed() % 2**32)
    errors: dict[str, float] = {}
    for shape in setup.size(shapes(), shapes()[5:7]):
        for kind, lens in steps(rng, setup).items():
            errors[f"{kind}: {shape.name}"] = attention_error(setup, rng, shape, *lens)
    errors |= moving_errors(setup)
    errors["widen_nuclei"] = nucleus_error(setup)
    bad = [name for name, error in errors.items() if not error <= tolerance_of(name)]
    return {"errors": errors, "wrong": bad}


def tolerance_of(name: str) -> float:
    if ":" not in name:
        return 0.0  # bytes are moved and floors are found, not computed
    dtype = next(d for d in TOLERANCES if str(d).removeprefix("torch.") in name.split(", "))
    return TOLERANCES[dtype]


def steps(rng: random.Random, setup: Setup) -> dict[str, tuple[list[int], list[int]]]:
    """Query and context lengths of a decode step, a prefill, and both in one."""
    longest = setup.size(3000, 40)
    contexts = [rng.randint(1, longest) for _ in range(setup.size(17, 3))]
    chunks = [rng.randint(1, c) for c in contexts[: setup.size(5, 2)]]
    ones = [1] * len(contexts)
    return {
        "decode": (ones, contexts),
        "prefill": (chunks, contexts[: len(chunks)]),
        "mixed": (chunks + ones[len(chunks) :], contexts),
    }


def attention_error(
    setup: Setup, rng: random.Random, shape: Shape, queries: list[int], contexts: list[int]
) -> float:
    """Of one packed step over a random pool; the pool's other layer must not be read."""
    counts = [-(-c // shape.block_size) for c in contexts]
    ids = rng.sample(range(sum(counts) + 3), sum(counts))
    ends = list(accumulate(counts))
    tables = [ids[end - count : end] for end, count in zip(ends, counts, strict=True)]
    size = (sum(counts) + 3, 2, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
    pool = torch.full(size, torch.nan, dtype=shape.dtype)
    pool[:, 1] = torch.randn(pool[:, 1].shape).to(shape.dtype)
    q = torch.randn(sum(queries), shape.num_heads, shape.head_dim).to(shape.dtype)
    sinks = torch.randn(shape.num_heads) if shape.has_sinks else None
    options: dict[str, Any] = {"window": shape.window, "softcap": shape.softcap}
    options |= {"scale": shape.head_dim**-0.5, "sinks": sinks}
    expected = reference.paged_attention(
        q, pool[:, 1], build_metadata(queries, contexts, tables, shape.block_size), **options
    )
    on_device = build_metadata(queries, contexts, tables, shape.block_size, device=setup.device)
    out = torch.full(q.shape, torch.nan, dtype=shape.dtype, device=setup.device)
    options["sinks"] = sinks.to(setup.device) if sinks is not None else None
    ops.paged_attention(
        q.to(setup.device), pool.to(setup.device)[:, 1], on_device, out=out, **options
    )
    return error_of(out, expected)


def error_of(out: Tensor, expected: Tensor) -> float:
    """Relative, by norm; infinite where something was not written."""
    difference = (out.cpu().double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if torch.isfinite(out).all() else float("inf")


def moving_errors(setup: Setup) -> dict[str, float]:
    """Kernels that move bytes: 0 or infinite."""
    blocks, layers, size = 37, 3, 16
    pool = setup.randn(blocks, layers, 2, 4, size, 64)
    expected = pool.cpu().clone()
    tokens = 50
    k, v = setup.randn(tokens, 4, 64), setup.randn(tokens, 4, 64)
    slots = torch.randperm(blocks * size)[:tokens]
    slots[::7] = -1
    ops.write_kv(pool[:, 1], k, v, slots.to(setup.device))
    reference.write_kv(expected[:, 1], k.cpu(), v.cpu(), slots)
    found = {"write_kv": _unequal(pool, expected)}
    ids = torch.randperm(blocks)[:20]
    ops.copy_blocks(pool, ids[:10].to(setup.device), ids[10:].to(setup.device), size)
    reference.copy_blocks(expected, ids[:10], ids[10:], size)
    found["copy_blocks"] = _unequal(pool, expected)
    rows = pool.view(torch.uint8).view(blocks, -1)
    staging = torch.zeros_like(rows[:10])
    ops.gather_blocks(rows, ids[:10].to(setup.device), staging)
    found["gather_blocks"] = _unequal(staging, rows.cpu()[ids[:10]])
    ops.scatter_blocks(staging, rows, ids[10:].to(setup.device))
    found["scatter_blocks"] = _unequal(rows[ids[10:].to(setup.device)], staging.cpu())
    return found


def nucleus_error(setup: Setup) -> float:
    """0 if flat rows have floors between the oracle's for a little less and a little more mass."""
    shape = setup.size((33, 128_256), (5, 1000))
    logits = torch.rand(shape) * torch.rand(shape[0], 1) * 8
    best = logits.amax(-1)
    mass = (logits - best[:, None]).exp().sum(-1) * torch.rand(shape[0]).clamp(0.01, 0.99)
    is_open = torch.rand(shape[0]) < 0.7
    low, high, found = best.clone(), best.clone(), best.to(setup.device, copy=True)
    reference.widen_nuclei(logits, best, mass * 1.00001, is_open, low)
    reference.widen_nuclei(logits, best, mass * 0.99999, is_open, high)
    ops.widen_nuclei(*(x.to(setup.device) for x in (logits, best, mass, is_open)), floor=found)
    is_between = (low <= found.cpu()) & (found.cpu() <= high)
    return 0.0 if is_between.all() else float("inf")


def _unequal(found: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(found.cpu(), expected) else float("inf")


def rows(found: dict[str, Any]) -> Rows:
    total, wrong = len(found["errors"]), found["wrong"]
    yield (
        "kernels against the oracle, cases wrong",
        f"{len(wrong)} of {total}",
        "<= 0",
        ("no" if wrong else "yes"),
    )
    for name in wrong:
        yield f"wrong: {name}", f"{found['errors'][name]:.2g}", "", ""
