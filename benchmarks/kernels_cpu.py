"""How fast are the CPU kernels, and what does the C library gain over plain torch?

    python benchmarks/kernels_cpu.py                        # wall clock, all cores
    python benchmarks/kernels_cpu.py --threads 1 --clock cpu   # on a machine that others use too

Backends alternate within a run and the figure is the median, so the ratio holds where the machine
is noisy. Decode is bound by memory (GB/s of K and V read), prefill by arithmetic (GFLOP/s of
visible query-key pairs). Results go to benchmarks/results/kernels-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tierkv.kernels import ops
from tierkv.kernels.linear import PackedLinear, can_pack
from tierkv.kernels.metadata import AttentionMetadata, build_metadata

RESULTS = Path(__file__).resolve().parent / "results" / "kernels-cpu.json"
BLOCK_SIZE, HEAD_DIM, NUM_HEADS, NUM_LAYERS = 16, 64, 12, 12
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Runs = dict[str, Callable[[], Any]]


def steps() -> dict[str, tuple[list[int], list[int]]]:
    """Query and context lengths by name."""
    rng = random.Random(1)
    return {
        "decode 32 x 32-640": ([1] * 32, [rng.randint(32, 640) for _ in range(32)]),
        "decode 1 x 64": ([1], [64]),
        "decode 1 x 1k": ([1], [1024]),
        "decode 1 x 16k": ([1], [16384]),
        "prefill 4 x 512": ([512] * 4, [512] * 4),
        "prefill 2k after 6k": ([2048], [8192]),
        "prefill 2k after 14k": ([2048], [16384]),
    }


def measure(runs: Runs, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def draw_pool(
    queries: list[int], contexts: list[int], num_kv_heads: int, dtype: torch.dtype, layers: int
) -> tuple[Tensor, AttentionMetadata]:
    """A pool of random KV and block tables scattered over it."""
    needs = [-(-n // BLOCK_SIZE) for n in contexts]
    ids = torch.randperm(sum(needs) + sum(needs) // 10 + 1).tolist()
    tables = [[ids.pop() for _ in range(need)] for need in needs]
    num_blocks = 1 + max(max(table) for table in tables)
    shape = (num_blocks, layers, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM)
    pool = torch.empty(shape, dtype=dtype).normal_()
    return pool, build_metadata(queries, contexts, tables, BLOCK_SIZE)


def on_backend(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """Run it with this backend."""

    def go() -> None:
        ops.set_backend(name)
        run()

    return go


def attention_rows(
    name: str, num_kv_heads: int, dtype: str, backends: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Attention of one step in all layers (decode) or one (prefill)."""
    queries, contexts = steps()[name]
    layers = NUM_LAYERS if name.startswith("decode") else 1
    pool, meta = draw_pool(queries, contexts, num_kv_heads, DTYPES[dtype], layers)
    q = torch.randn(sum(queries), NUM_HEADS, HEAD_DIM).to(pool.dtype)
    out = torch.empty_like(q)

    def run() -> None:
        for layer in range(layers):
            ops.paged_attention(q, pool[:, layer], meta, scale=HEAD_DIM**-0.5, out=out)

    times = measure({b: on_backend(b, run) for b in backends}, args.repeats, args.read_clock)
    pairs = sum(n * (c - n) + n * (n + 1) / 2 for n, c in zip(queries, contexts, strict=True))
    num_bytes = layers * sum(contexts) * 2 * num_kv_heads * HEAD_DIM * pool.element_size()
    flops = layers * 4 * NUM_HEADS * HEAD_DIM * pairs
    what = {"op": "paged_attention", "case": name, "kv_heads": num_kv_heads, "dtype": dtype}
    return [
        {**what, "layers": layers, "backend": b, **rates(t, num_bytes, flops)}
        for b, t in times.items()
    ]


def write_rows(
    num_tokens: int, dtype: str, backends: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Writing a step's keys and values in all layers."""
    pool, meta = draw_pool([num_tokens], [num_tokens], NUM_HEADS, DTYPES[dtype], NUM_LAYERS)
    k, v = torch.randn(2, NUM_HEADS, num_tokens, HEAD_DIM).to(pool.dtype).transpose(1, 2)

    def run() -> None:
        for layer in range(NUM_LAYERS):
            ops.write_kv(pool[:, layer], k, v, meta.slot_mapping)

    times = measure({b: on_backend(b, run) for b in backends}, args.repeats, args.read_clock)
    num_bytes = NUM_LAYERS * 2 * k.numel() * k.element_size()
    what = {"op": "write_kv", "case": f"{num_tokens} tokens", "dtype": dtype}
    return [
        {**what, "kv_heads": NUM_HEADS, "layers": NUM_LAYERS, "backend": b, **rates(t, num_bytes)}
        for b, t in times.items()
    ]


@torch.inference_mode()
def linear_rows(
    size: tuple[int, int], rows: int, dtype: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One linear layer, plain and packed."""
    if not can_pack("cpu", DTYPES[dtype]):
        return []
    plain = nn.Linear(*size).to(DTYPES[dtype])
    packed = PackedLinear(plain)
    x = torch.randn(rows, size[0]).to(DTYPES[dtype])
    times = measure(
        {"packed": lambda: packed(x), "torch": lambda: plain(x)}, 3 * args.repeats, args.read_clock
    )
    num_bytes = plain.weight.numel() * plain.weight.element_size()
    what = {"op": "linear", "case": f"{size[0]}->{size[1]}, {rows} rows", "dtype": dtype}
    return [
        {**what, "backend": b, **rates(t, num_bytes, 2 * rows * plain.weight.numel())}
        for b, t in times.items()
    ]


def row_op_rows(
    num_rows: int, dtype: str, backends: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """What runs between the linear layers, once; bytes read and written."""
    x, joint = (torch.randn(num_rows, n).to(DTYPES[dtype]) for n in (768, 2 * 2048))
    q, k = (torch.randn(n, num_rows, HEAD_DIM).to(DTYPES[dtype]) for n in (NUM_HEADS, 4))
    cos, sin = torch.randn(2, num_rows, HEAD_DIM).to(DTYPES[dtype])
    weight = torch.ones(768)
    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "rms_norm": (lambda: ops.rms_norm(x, weight, 1e-5, round_first=True), 2 * x.nbytes),
        "act_and_mul": (lambda: ops.act_and_mul(joint, "silu"), joint.nbytes * 3 // 2),
        "rotate": (lambda: ops.rotate(q, k, cos, sin), 2 * (q.nbytes + k.nbytes + cos.nbytes)),
    }
    rows = []
    for name, (run, num_bytes) in cases.items():
        what = {"op": name, "case": f"{num_rows} rows", "dtype": dtype}
        runs = {b: on_backend(b, run) for b in backends}
        times = measure(runs, 10 * args.repeats, args.read_clock)
        rows += show([{**what, "backend": b, **rates(t, num_bytes)} for b, t in times.items()])
    return rows


def rates(seconds: float, num_bytes: float, flops: float = 0) -> dict[str, float]:
    """A measured time with what it means."""
    return {
        "ms": round(seconds * 1e3, 4),
        "gb_per_s": round(num_bytes / seconds / 1e9, 2),
        "gflop_per_s": round(flops / seconds / 1e9, 1),
    }


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, printed as it comes."""
    ops.set_backend("auto")
    backends = ["native", "torch"] if ops.get_backend() == "native" else ["torch"]
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for name in steps():
            for num_kv_heads in (12, 4):
                rows += show(attention_rows(name, num_kv_heads, dtype, backends, args))
        for num_tokens in (32, 2048):
            rows += show(write_rows(num_tokens, dtype, backends, args))
        for num_rows in (1, 32, 512):
            rows += row_op_rows(num_rows, dtype, backends, args)
        for size in ((768, 768), (768, 3072), (3072, 768), (768, 50272)):
            for num_rows in (1, 8, 32):
                rows += show(linear_rows(size, num_rows, dtype, args))
    return rows


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print one line per backend, with its speed relative to the last one's."""
    for row in rows:
        ratio = rows[-1]["ms"] / row["ms"]
        heads = f"{NUM_HEADS}/{row['kv_heads']}" if "kv_heads" in row else ""
        print(
            f"{row['op']:16} {row['case']:22} {heads:6} {row['dtype']:5} {row['backend']:7}"
            f"{row['ms']:11.3f} ms {row['gb_per_s']:8.1f} GB/s {row['gflop_per_s']:8.1f} GFLOP/s"
            f" {ratio:7.2f}x",
            flush=True,
        )
    return rows


def machine() -> dict[str, Any]:
    """CPU model, cores and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "cpu": model,
        "cores": torch.multiprocessing.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.read_clock = time.perf_counter if args.clock == "wall" else time.process_time
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report = {
        "command": shlex.join(["python", "benchmarks/kernels_cpu.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": args.threads,
        "clock": args.clock,
        "block_size": BLOCK_SIZE,
        "head_dim": HEAD_DIM,
        "rows": run_all(args),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
