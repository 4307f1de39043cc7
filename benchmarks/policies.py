"""Which eviction policy keeps the blocks that come again? Traces without an engine.

Requests take no time and come one after another; one tier holds a share of the trace's different
blocks. The hit rates are those of `tierkv.sim.instant`, in tokens. MIN is the optimum with the
whole future known; a policy's score is the part of the gap from lru to it that it closes:

    score = (hit rate - that of lru) / (that of MIN - that of lru)

The result says nothing of the machine and the time, so that it is the same for the same input.

    python benchmarks/policies.py [--quick] [--trace FILE] [--trace chat] [--shares 1,2,5,10]
        [--policies lru,reuse] [--block-size 512] [--variants all,first,second,without-hints]
        [--jobs 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import plots
from common.runs import RESULTS, print_table

from tierkv.policies import registry
from tierkv.sim import instant
from tierkv.sim.coarsen import coarsen
from tierkv.sim.generate import generate_trace
from tierkv.sim.trace import Trace, TraceRequest
from tierkv.sim.traces import read_trace
from tierkv.sim.workloads import WORKLOADS

BASE, OFFLINE = "lru", "belady"
VARIANTS = ("all", "first", "second", "without-hints")
"""The whole trace, a half of its requests, or all without sessions, turns and stop reasons."""

_foreseen: list[instant.Foreseen] = []  # of the trace that is replayed; worker processes inherit it


def options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--quick", action="store_true", help="a small generated trace: does it run at all?")
    add("--trace", action="append", help=f"a file, or a workload: {', '.join(WORKLOADS)}")
    add("--shares", default="1,2,5,10", help="capacities, in %% of the different blocks")
    add("--policies", help="comma-separated, lru always among them; default: all")
    add("--requests", type=int, help="the first so many; workloads have 5000 otherwise")
    add("--block-size", type=int, help="tokens per block, a multiple of the trace's own")
    add("--variants", default="all", help=f"of each trace: {', '.join(VARIANTS)}")
    add("--seed", type=int, default=0, help="of workloads")
    add("--jobs", type=int, default=1, help="processes")
    add("--name", default="policies", help="of the result's JSON and PNG")
    add("--out", type=Path, default=RESULTS, help="folder of JSON and PNG")
    return result


# ---------------------------------------------------------------------- the trace


def open_trace(name: str, args: argparse.Namespace) -> Trace:
    if name in WORKLOADS:
        count = args.requests or (200 if args.quick else 5000)
        trace = generate_trace(name, num_requests=count, seed=args.seed)
    else:
        trace = read_trace(name, limit=args.requests)
    return trace if args.block_size is None else coarsen(trace, args.block_size)


def varied(trace: Trace, variant: str) -> Trace:
    if variant == "all":
        return trace
    if variant not in VARIANTS:
        raise SystemExit(f"--variants: {variant!r} is none of {', '.join(VARIANTS)}")
    requests = list(trace)
    half = len(requests) // 2
    if variant == "without-hints":
        chosen = list(map(without_hints, requests))
    else:
        chosen = requests[:half] if variant == "first" else requests[half:]
    return Trace(f"{trace.name}-{variant}", trace.block_size, lambda: iter(chosen))


def without_hints(request: TraceRequest) -> TraceRequest:
    return dataclasses.replace(request, session="", turn=0, stop_reason="")


# ---------------------------------------------------------------------- one trace


def measure(trace: Trace, args: argparse.Namespace) -> dict[str, Any]:
    """All policies at all capacities, and the optimum."""
    foreseen = instant.Foreseen.of(trace)
    _foreseen[:] = [foreseen]
    names = policies_of(args)
    shares = [float(share) for share in args.shares.split(",")]
    tasks = [(name, capacity_at(share)) for share in shares for name in names]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        found = list(pool.map(replay_one, *zip(*tasks, strict=True)))
    hits = dict(zip(tasks, found, strict=True))
    infinite = foreseen.infinite()
    return {
        "block_size": trace.block_size,
        "requests": infinite.num_requests,
        "input_tokens": infinite.input_tokens,
        "lookups": infinite.num_lookups,
        "unique_blocks": foreseen.num_unique,
        "infinite": round(infinite.rate, 6),
        "shares": {f"{share:g}": at_share(share, names, hits) for share in shares},
    }


def policies_of(args: argparse.Namespace) -> list[str]:
    known = [name for name in registry.known("eviction") if name != OFFLINE]
    chosen = args.policies.split(",") if args.policies else known
    return [BASE, *(name for name in chosen if name != BASE)]


def capacity_at(share: float) -> int:
    """That share of the different blocks, in per cent."""
    return max(1, int(_foreseen[0].num_unique * share / 100))


def replay_one(name: str, capacity: int) -> instant.Hits:
    foreseen = _foreseen[0]
    policy = registry.create("eviction", name)
    found = instant.replay(foreseen.requests, policy, capacity, foreseen.block_size)
    print(f"{name} in {capacity} blocks: {found.rate:.2%}", flush=True)
    return found


def at_share(
    share: float, names: list[str], hits: dict[tuple[str, int], instant.Hits]
) -> dict[str, Any]:
    foreseen, capacity = _foreseen[0], capacity_at(share)
    best = instant.optimum(foreseen, capacity).rate
    pinned = instant.optimum(foreseen, capacity, pinned=True).rate
    found = {name: hits[name, capacity] for name in names}
    base = found[BASE].rate
    return {
        "capacity": capacity,
        "optimum": round(best, 6),
        "optimum_pinned": round(pinned, 6),
        "policies": {
            name: {
                "hit_rate": round(each.rate, 6),
                "score": round((each.rate - base) / (best - base), 4) if best > base else 0.0,
                "hit_blocks": each.num_hits,
                "evicted_blocks": each.num_evicted,
            }
            for name, each in found.items()
        },
    }


# ---------------------------------------------------------------------- what is shown


def show(name: str, result: dict[str, Any]) -> None:
    shares = result["shares"]
    header = [f"{name}, hit rate (score) in %", *(f"{share} %" for share in shares)]
    names = next(iter(shares.values()))["policies"]
    rows: list[list[object]] = [
        [policy, *(shown(entry["policies"][policy]) for entry in shares.values())]
        for policy in names
    ]
    for label, key in (("MIN, requests' blocks stay", "optimum_pinned"), ("MIN", "optimum")):
        rows.append([label, *(f"{entry[key]:.2%}" for entry in shares.values())])
    rows.append(["infinite", *(f"{result['infinite']:.2%}" for _ in shares)])
    print_table(header, rows)
    print()


def shown(figures: dict[str, float]) -> str:
    return f"{100 * figures['hit_rate']:.2f} ({100 * figures['score']:+.1f})"


def plot(target: Path, name: str, result: dict[str, Any]) -> None:
    shares = result["shares"]
    series = {
        policy: [100 * entry["policies"][policy]["hit_rate"] for entry in shares.values()]
        for policy in next(iter(shares.values()))["policies"]
    }
    series["MIN (optimum)"] = [100 * entry["optimum"] for entry in shares.values()]
    plots.lines(
        target,
        [float(share) for share in shares],
        series,
        title=f"{name}, blocks of {result['block_size']} tokens",
        left_label="token hit rate (%)",
        x_label="capacity (% of the different blocks)",
        floor=(100 * result["infinite"], "infinite"),
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = options().parse_args(argv)
    if args.quick and args.out == RESULTS:
        args.out = None
    result: dict[str, Any] = {"benchmark": "policies", "traces": {}}
    for name, variant in product(args.trace or ["chat"], args.variants.split(",")):
        trace = varied(open_trace(name, args), variant)
        found = result["traces"][trace.name] = measure(trace, args)
        show(trace.name, found)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=1) + "\n"
            (args.out / f"{args.name}.json").write_text(text)
            if variant == "all":
                plot(args.out / f"{args.name}-{trace.name}.png", trace.name, found)
    return result


if __name__ == "__main__":
    main()
