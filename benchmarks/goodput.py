"""How much load does one GPU carry within its SLO, and what does each mechanism add?

A trace through the engine in virtual time (docs/simulation.md), as vLLM would decide and as tierkv
does, at rising rates: goodput against the p99 of time to first token. Then, at one rate, the
mechanisms one after the other, from the baseline to all of them.

    python benchmarks/goodput.py --trace agent_A.jsonl.gz [--rates 0.2 0.3 0.4] [--at 0.4]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.plots import plt
from common.runs import parse, parser, print_table, write

from tierkv.cli.sim_options import LabOptions, Setting, read_setting
from tierkv.sim.cases import BASELINES
from tierkv.sim.machine import Machine
from tierkv.sim.sizes import parse_tiers
from tierkv.sim.study import Case, Outcome, Study, run_study
from tierkv.sim.trace_formats import ReadOptions
from tierkv.types import TierName

LIMITS_S = (120.0, 240.0, 480.0, 960.0)
"""Of the p99 of time to first token, at which goodputs are compared: cold prompts of 100,000 tokens
and more make it long at any load."""

STEPS: list[tuple[str, dict[str, Any]]] = [
    ("generated blocks go down too", {"admission_policy": "write-through"}),
    ("an NVMe tier", {}),
    ("prefetch for the queue", {"prefetch_policy": "lookahead"}),
    ("load or recompute by cost", {"load_policy": "auto"}),
    ("preemption by cost", {"preemption_mode": "auto"}),
]
"""What is added to the baseline, one after the other; the eviction policy follows."""


def options() -> argparse.ArgumentParser:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--trace", default="agents", help="file or workload")
    arguments.add_argument("--requests", type=int, help="of the trace, from its start")
    arguments.add_argument("--model", default="llama-3.1-8b")
    arguments.add_argument("--hardware", default="h200:drives=4")
    arguments.add_argument("--tiers", default="gpu=auto,cpu=256GiB,nvme=4TB")
    arguments.add_argument("--coarsen", type=int, default=512, help="tokens per simulated block")
    arguments.add_argument("--eviction", default="reuse", help="the last step of the ladder")
    arguments.add_argument("--rates", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6])
    arguments.add_argument("--at", type=float, help="rate of the ladder; default: the middle one")
    arguments.add_argument("--jobs", type=int, default=2)
    return arguments


def setting_of(args: argparse.Namespace) -> tuple[LabOptions, Setting]:
    lab = LabOptions(
        trace=args.trace,
        model=args.model,
        hardware=args.hardware,
        requests=25 if args.quick else args.requests,
        coarsen=None if args.quick else args.coarsen,
        context_limit=False,
        jobs=1 if args.quick else args.jobs,
    )
    return lab, read_setting(lab, ReadOptions())


def ladder(setting: Setting, tiers: str, eviction: str) -> list[tuple[str, Machine]]:
    """From the baseline to everything, a mechanism at a time."""
    blocks = parse_tiers(tiers, setting.units)
    upper = {tier: count for tier, count in blocks.items() if tier is not TierName.NVME}
    chosen: dict[str, Any] = {**setting.engine, **BASELINES["vllm"]}
    size = setting.stats.block_size
    base = Machine(setting.shape, setting.hardware, size, upper, dict(chosen))
    found = [("as vLLM decides", base)]
    for name, added in STEPS:
        chosen |= added
        if name == "an NVMe tier":
            upper = blocks
        found.append((name, dataclasses.replace(base, blocks=upper, options=dict(chosen))))
    chosen["eviction_policy"] = eviction
    last = dataclasses.replace(base, blocks=upper, options=dict(chosen))
    return [*found, (f"eviction by {eviction}", last)]


def case(name: str, machine: Machine, setting: Setting, rate: float) -> Case:
    load = dataclasses.replace(setting.load, rate=rate)
    return Case({"system": name, "rate": f"{rate:g}"}, machine, load)


def at_limits(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The most goodput of any rate whose p99 is within each limit."""
    return {
        f"{limit:g}": max(
            (o.measures.goodput for o in outcomes if o.measures.ttft_s["p99"] <= limit),
            default=0.0,
        )
        for limit in LIMITS_S
    }


def row(outcome: Outcome) -> dict[str, Any]:
    found = outcome.measures
    return {
        **outcome.case.labels,
        "goodput": round(found.goodput, 4),
        "good %": round(100 * found.good_share, 1),
        "req/s": round(found.requests_per_s, 4),
        "TTFT p50": round(found.ttft_s["p50"], 2),
        "TTFT p99": round(found.ttft_s["p99"], 2),
        "hit %": round(100 * found.hit_rate, 1),
        "hit % nvme": round(100 * found.hit_rate_nvme, 1),
        "busy %": round(100 * found.busy_share, 1),
        "up GB": round(found.promoted_bytes / 1e9),
        "NVMe written GB": round(found.nvme_written_bytes / 1e9),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(options(), argv)
    lab, setting = setting_of(args)
    steps = ladder(setting, args.tiers, args.eviction)
    rates = args.rates[:1] if args.quick else args.rates
    at = args.at if args.at is not None else rates[len(rates) // 2]
    ends = [steps[0], ("tierkv", steps[-1][1])]
    sweep = [case(name, machine, setting, rate) for rate in rates for name, machine in ends]
    rungs = [case(name, machine, setting, at) for name, machine in steps]
    start = time.perf_counter()
    done = run_study(Study(setting.source, [*sweep, *rungs], lab.slo, False), lab.num_jobs)
    swept, climbed = done[: len(sweep)], done[len(sweep) :]
    by_system = {name: [o for o in swept if o.case.labels["system"] == name] for name, _ in ends}
    best = {name: at_limits(outcomes) for name, outcomes in by_system.items()}
    for outcomes in (swept, climbed):
        rows = [row(outcome) for outcome in outcomes]
        print_table(list(rows[0]), [list(each.values()) for each in rows])
    print("most goodput with p99 TTFT within a limit:", best)
    found = {
        "trace": dataclasses.asdict(setting.stats),
        "hardware": args.hardware,
        "tiers": args.tiers,
        "slo": dataclasses.asdict(lab.slo),
        "excluded": swept[0].measures.num_excluded,
        "rates": [row(outcome) for outcome in swept],
        "goodput_within_p99_ttft_s": best,
        "ladder": [row(outcome) for outcome in climbed],
        "seconds": round(time.perf_counter() - start),
    }
    if args.out is not None:
        draw(by_system, args.out / "goodput.png")
    return write(args.out, "goodput", found)


def draw(by_system: dict[str, list[Outcome]], path: Path) -> None:
    """Goodput against the p99 of time to first token."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, outcomes in by_system.items():
        points = [(o.measures.ttft_s["p99"], o.measures.goodput) for o in outcomes]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
        for outcome, point in zip(outcomes, points, strict=True):
            axes.annotate(outcome.case.labels["rate"], point, fontsize="x-small")
    axes.set_xscale("log")
    axes.set(xlabel="p99 of time to first token, s", ylabel="good requests per second")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
