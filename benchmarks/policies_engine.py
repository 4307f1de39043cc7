"""Which eviction policy keeps the blocks that come again? A trace through the real engine.

`policies.py` asks the same of the policies alone, without an engine, on whole traces.

Requests are replayed one after another with a tiny model, each id of the trace as one block, over
a pool and a CPU tier three times its size. Before each request whatever is on its way down has
arrived, and hits below the pool are always loaded, so that the policies alone decide the figures.
Each policy runs in both tiers, and in the CPU tier below an lru pool. The ceiling is the offline
optimum in one tier of both sizes together.

    python benchmarks/policies_engine.py [--quick] [--trace FILE] [--requests 1000]
        [--shares 2.5,5,10]
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import traces
from common.models import model_dir, slot_bytes
from common.runs import parse, parser, print_table, write
from common.traces import BLOCK_SIZE, Trace

from tierkv import SamplingParams
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.policies import registry

CPU_TIMES = 3
"""Blocks of the CPU tier for each one of the pool."""

OFFLINE = "belady"
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def online_policies() -> list[str]:
    """All that an engine can run: the offline optimum must be told what comes."""
    return [name for name in registry.known("eviction") if name != OFFLINE]


def combinations(*, quick: bool) -> list[tuple[str, str]]:
    """Policies of the pool and of the CPU tier."""
    names = online_policies()
    same = [(name, name) for name in names]
    return same if quick else same + [("lru", name) for name in names if name != "lru"]


def pool_blocks(trace: Trace, share: float) -> int:
    """That share of the different blocks, but no less than the longest request runs in."""
    longest = max(map(len, trace))
    return max(int(share * traces.num_unique(trace)), longest + 2)


def make_engine(trace: Trace, pool: int, policies: tuple[str, str]) -> EngineCore:
    config = EngineConfig(
        model=str(model_dir("tiny")),
        dtype="bfloat16",
        verify_model=False,
        block_size=BLOCK_SIZE,
        max_model_len=max(map(len, trace)) * BLOCK_SIZE + 4,
        num_gpu_blocks=pool,
        offload=f"cpu={pool * CPU_TIMES * slot_bytes('tiny', BLOCK_SIZE)}",
        eviction_policy=f"gpu={policies[0]},cpu={policies[1]}",
        load_policy="load",
        prefetch_policy="none",
    )
    return EngineCore.from_config(config)


def replay(core: EngineCore, trace: Trace) -> dict[str, Any]:
    """Serve all requests; what they hit, by tier."""
    start = time.perf_counter()
    for number, request in enumerate(trace):
        core.add_request(EngineRequest(str(number), traces.prompt_of(request), ONE_TOKEN))
        while core.has_work:
            core.step()
        settle(core)
    seconds, metrics = time.perf_counter() - start, core.metrics()
    hits, below = metrics["hit_tokens"], metrics["hit_tokens_cpu"]
    return {
        "hit_tokens": hits,
        "hit_tokens_gpu": hits - below,
        "hit_tokens_cpu": below,
        "share": round(hits / metrics["queried_tokens"], 4),
        "queried_tokens": metrics["queried_tokens"],
        "seconds": round(seconds, 2),
    }


def settle(core: EngineCore) -> None:
    """Let everything that is on its way down arrive."""
    while core.has_background_work:
        core.work_in_background()
        if core.cache.has_moves:
            core.cache.wait(1.0)


def measure(trace: Trace, share: float, *, quick: bool) -> dict[str, Any]:
    """All policies at one capacity, and the ceiling."""
    pool = pool_blocks(trace, share)
    entry: dict[str, Any] = {"gpu_blocks": pool, "cpu_blocks": pool * CPU_TIMES, "policies": {}}
    for policies in combinations(quick=quick):
        core = make_engine(trace, pool, policies)
        if core.metrics()["cpu_blocks"] != entry["cpu_blocks"]:
            raise RuntimeError(f"the CPU tier has {core.metrics()['cpu_blocks']} blocks")
        entry["policies"][",".join(policies)] = replay(core, trace)
        core.close()
    queried = next(iter(entry["policies"].values()))["queried_tokens"]
    best = traces.ceiling(trace, pool * (1 + CPU_TIMES)) * BLOCK_SIZE
    entry["ceiling"] = {"hit_tokens": best, "share": round(best / queried, 4)}
    return entry


def show(capacities: dict[str, Any]) -> None:
    for share, entry in capacities.items():
        sizes = f"pool {entry['gpu_blocks']}, CPU {entry['cpu_blocks']} blocks ({share})"
        rows: list[list[object]] = [
            [
                f"gpu={gpu}, cpu={cpu}",
                figures["hit_tokens_gpu"],
                figures["hit_tokens_cpu"],
                figures["hit_tokens"],
                f"{figures['share']:.2%}",
                figures["seconds"],
            ]
            for (gpu, cpu), figures in (
                (names.split(","), figures) for names, figures in entry["policies"].items()
            )
        ]
        best = entry["ceiling"]
        rows.append(["offline optimum", "", "", best["hit_tokens"], f"{best['share']:.2%}", ""])
        print_table([sizes, "hits gpu", "hits cpu", "hits", "of queried", "seconds"], rows)
        print()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=1)
    options.add_argument("--trace", type=Path, help="JSON lines; default: a small synthetic trace")
    options.add_argument("--requests", type=int, default=1000, help="take the first so many")
    options.add_argument("--shares", default="2.5,5,10", help="pool, in %% of the different blocks")
    args = parse(options, argv)
    count = min(args.requests, 40) if args.quick else args.requests
    trace = traces.read(args.trace, count) if args.trace else traces.synthetic(count)
    shares = [5.0] if args.quick else [float(s) for s in args.shares.split(",")]
    capacities = {f"{share:g} %": measure(trace, share / 100, quick=args.quick) for share in shares}
    show(capacities)
    result = {
        "trace": args.trace.name if args.trace else "synthetic",
        "requests": len(trace),
        "unique_blocks": traces.num_unique(trace),
        "block_size": BLOCK_SIZE,
        "capacities": capacities,
    }
    return write(args.out, "policies_engine", result)


if __name__ == "__main__":
    main()
