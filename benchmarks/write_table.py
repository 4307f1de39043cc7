"""One table of every figure in results/ next to its target: printed, and kept as results/TABLE.md.

python benchmarks/write_table.py [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.runs import RESULTS, print_table

Row = tuple[str, str, str, str]
"""What was measured, the figure, the target, whether it was reached."""

NO_TARGET = ("", "")


def at_least(value: float, target: float, unit: str = "x") -> tuple[str, str, str]:
    return _shown(value, unit), f">= {_shown(target, unit)}", "yes" if value >= target else "no"


def at_most(value: float, target: float, unit: str) -> tuple[str, str, str]:
    return _shown(value, unit), f"<= {_shown(target, unit)}", "yes" if value <= target else "no"


def _shown(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:,.2f}{unit if unit == 'x' else ' ' + unit}"


def hf_baseline(result: dict[str, Any]) -> Iterator[Row]:
    target = result["target_ratio"]
    for count, entry in result["equal_work"].items():
        name = f"faster than `generate`, {count} tokens, batch 1"
        if entry is list(result["equal_work"].values())[-1]:
            yield name, *at_least(entry["ratio"], target)
        else:
            yield name, _shown(entry["ratio"], "x"), *NO_TARGET


def throughput(result: dict[str, Any]) -> Iterator[Row]:
    for model, entry in result["models"].items():
        own = entry["systems"]["tierkv"]["tokens_per_s"]
        yield f"{model}, 32 mixed requests", _shown(own, "tokens/s"), *NO_TARGET
        for system, ratio in entry["ratios"].items():
            name = f"{model}, faster than {system.replace('_', ' ')}"
            yield name, *at_least(ratio, result["target_ratio"])


def prefix_reuse(result: dict[str, Any]) -> Iterator[Row]:
    speedup = result["shared_prefix"]["speedup"]
    yield (
        "shared 1,536-token prefix x 16, reuse on against off",
        *at_least(speedup, result["target_speedup"]),
    )
    for kind, shapes in result["workloads"].items():
        for shape, entry in shapes.items():
            yield (
                f"{kind}, {shape}, reuse on against off",
                _shown(entry["speedup"], "x"),
                *NO_TARGET,
            )


def memory_waste(result: dict[str, Any]) -> Iterator[Row]:
    share = result["paged"]["16"]["share"]
    yield (
        "reserved KV that holds tokens, paged at 16",
        *at_least(share, result["target_share_at_16"], "%"),
    )
    yield "the same, reserving max_model_len", _shown(result["reserve_max_share"], "%"), *NO_TARGET


def block_size(result: dict[str, Any]) -> Iterator[Row]:
    sizes = result["block_sizes"]
    best = max(sizes, key=lambda size: float(sizes[size]["tokens_per_s"]))
    share = sizes["16"]["tokens_per_s"] / sizes[best]["tokens_per_s"]
    yield f"throughput at block size 16, of the best ({best})", _shown(share, "%"), *NO_TARGET


def scheduler_overhead(result: dict[str, Any]) -> Iterator[Row]:
    name = f"plan + commit, {result['sequences']} sequences of {result['context']} tokens"
    yield name, *at_most(result["plan_and_commit_ms"], 1.5, "ms")
    name = f"prefix match of {result['match_tokens']:,} tokens"
    yield name, *at_most(result["match_ms"], 40.0, "ms")


def overlap(result: dict[str, Any]) -> Iterator[Row]:
    for name, found in result["idle_ms"].items():
        what = f"a device that needs {name} ms a step of {result['sequences']} stands idle"
        figure = f"{found['overlapped']:.2f} ms ({found['in turn']:.2f} ms in turn)"
        yield what, figure, *NO_TARGET


def moves(result: dict[str, Any]) -> Iterator[Row]:
    for size, entry in result["memory"].items():
        target = result["targets_memory"][size]
        yield from _links(entry, f"blocks of {int(size) >> 10} KiB", "memcpy", target)
    for order, entries in result["nvme"].items():
        for size, entry in entries.items():
            what = f"blocks of {int(size) >> 10} KiB {order}"
            yield from _links(entry, what, "fio", result["target_nvme"])


def _links(entry: dict[str, Any], what: str, base: str, target: float) -> Iterator[Row]:
    shares = entry.get(f"share_of_{base}", {})
    for link, figures in entry["systems"].items():
        if link in shares:
            yield f"{link}, {what}, of {base}", *at_least(shares[link], target, "%")
        elif "->" in link:
            yield f"{link}, {what}", _shown(figures["gb_per_s"], "GB/s"), *NO_TARGET


def tier_ttft(result: dict[str, Any]) -> Iterator[Row]:
    for length, entry in result["lengths"].items():
        for where, speedup in entry["speedup"].items():
            name = f"first token of {int(length):,}, prefix in {where}, faster than cold"
            yield name, *at_least(speedup, result["targets"][where])
        for where, excess_s in entry["auto_excess_s"].items():
            best = min(entry[f"{where}/{p}"]["median_s"] for p in ("load", "recompute"))
            name = f"the same, {where}: `auto` above the better of load and recompute"
            yield name, *at_most(1000 * excess_s, max(5.0, 50 * best), "ms")


def oversubscribe(result: dict[str, Any]) -> Iterator[Row]:
    for name, variant in result["variants"].items():
        rate = _shown(variant["tokens_per_s"], "tokens/s")
        yield f"chats in 1/4 of the pool, {name}", rate, *NO_TARGET
    for tiers, ratios in result["ratios"].items():
        for name, ratio in ratios.items():
            target = result["targets"].get(name)
            shown = at_least(ratio, target) if target else (_shown(ratio, "x"), *NO_TARGET)
            yield f"chats in 1/4 of the pool, {tiers}, {name}", *shown


def policies(result: dict[str, Any]) -> Iterator[Row]:
    for trace, entry in result["traces"].items():
        for share, figures in entry["shares"].items():
            rates = {name: each["hit_rate"] for name, each in figures["policies"].items()}
            best = max(rates, key=lambda name: float(rates[name]))
            compared = f"lru {rates['lru']:.1%}, optimum {figures['optimum']:.1%}"
            text = f"{trace}, {share} % of its blocks, {best}: hits ({compared})"
            yield text, _shown(rates[best], "%"), *NO_TARGET


def policies_engine(result: dict[str, Any]) -> Iterator[Row]:
    for share, entry in result["capacities"].items():
        same = {
            n.split(",")[0]: f for n, f in entry["policies"].items() if len({*n.split(",")}) == 1
        }
        best = max(same, key=lambda name: int(same[name]["hit_tokens"]))
        ceiling = entry["ceiling"]["share"]
        for name in dict.fromkeys(("lru", best)):
            text = f"{result['trace']}, pool {share} + CPU, {name}: hits (optimum {ceiling:.1%})"
            yield text, _shown(same[name]["share"], "%"), *NO_TARGET


def overhead(result: dict[str, Any]) -> Iterator[Row]:
    for pool, entry in result["pools"].items():
        name = f"throughput lost by tiers where nothing is reused, {pool} pool"
        yield name, *at_most(entry["loss"], result["target_loss"], "%")


def decode_latency(result: dict[str, Any]) -> Iterator[Row]:
    default = str(result["default_budget_mib"])
    for budget in ("0", default):
        point = result["budgets"][budget]
        name = (
            f"between two tokens, {'one tier' if budget == '0' else budget + ' MiB a step moving'}"
        )
        for which in ("p50", "p99"):
            yield f"{name}, {which}", _shown(point[f"{which}_ms"], "ms"), *NO_TARGET


def http_overhead(result: dict[str, Any]) -> Iterator[Row]:
    name = f"{result['requests']} streams by HTTP, of the rate in process"
    yield name, *at_least(result["ratio"], result["target_ratio"], "%")
    extra = result["first_ms"]["overhead_ms"]
    name = "first token by HTTP, later than in process"
    yield name, *at_most(extra, result["target_first_ms"], "ms")


def soak(result: dict[str, Any]) -> Iterator[Row]:
    what = f"{result['clients']} clients for {result['minutes']:g} minutes"
    yield f"{what}, errors", *at_most(result["num_errors"], 0, "")
    yield f"{what}, starved", *at_most(result["starved"], 0, "")
    for name, count in result["held_afterwards"].items():
        yield f"{what}, {name} left afterwards", *at_most(count, 0, "")
    for name, growth in result["memory_growth"].items():
        yield f"{what}, memory growth, {name}", *at_most(growth, result["target_growth"], "%")
    for name, figures in result["latency"].items():
        words = name.removesuffix("_s").replace("_", " ")
        yield f"{what}, p99 {words}", _shown(figures["p99"], "s"), *NO_TARGET


def window(result: dict[str, Any]) -> Iterator[Row]:
    name = f"being watched, {result['sequences']} sequences, share of the engine's time"
    yield name, *at_most(result["share_of_time"], result["target_share"], "%")


def chaos(result: dict[str, Any]) -> Iterator[Row]:
    what = f"{result['seeds']:,} simulated histories with faults, laws broken"
    yield what, *at_most(result["failed"], 0, "")


def goodput(result: dict[str, Any]) -> Iterator[Row]:
    within = result["goodput_within_p99_ttft_s"]
    base, ours = within["as vLLM decides"], within["tierkv"]
    for limit, good in base.items():
        if good:
            what = f"simulated goodput with p99 TTFT <= {limit} s, against vLLM's decisions"
            yield what, *at_least(round(ours[limit] / good, 2), 2, "x")


def fidelity(result: dict[str, Any]) -> Iterator[Row]:
    target, trace = result["target"], result["trace"]
    points = abs(result["hit_rate_off_points"])
    what = f"{trace}, simulated hit rate, off by points"
    yield what, *at_most(points, target["hit_rate_points"], "points")
    off = abs(result["ttft_p50_off"])
    yield f"{trace}, simulated median TTFT, off by", *at_most(off, target["ttft_p50"], "%")


def fidelity_agents(result: dict[str, Any]) -> Iterator[Row]:
    yield from fidelity(result)


def sim_speed(result: dict[str, Any]) -> Iterator[Row]:
    target = result["target_lookups_per_s"]
    for name, found in result["speed"].items():
        what = f"simulated block look-ups per second, {name}"
        yield what, *at_least(found["lookups_per_s"], target, "/s")
    sizes = result["growth"]["resident_mb"]
    what = f"{result['growth']['requests']:,} simulated requests, memory at the end"
    yield what, _shown(sizes[-1], "MB"), *NO_TARGET


READERS = {
    reader.__name__: reader
    for reader in (
        hf_baseline,
        throughput,
        prefix_reuse,
        memory_waste,
        block_size,
        scheduler_overhead,
        overlap,
        moves,
        tier_ttft,
        oversubscribe,
        policies,
        policies_engine,
        overhead,
        decode_latency,
        http_overhead,
        soak,
        window,
        chaos,
        goodput,
        fidelity,
        fidelity_agents,
        sim_speed,
    )
}


def rows_of(folder: Path) -> list[Row]:
    """The rows of every result that is there, in the order of `READERS`."""
    rows: list[Row] = []
    for name, reader in READERS.items():
        path = folder / f"{name}.json"
        if path.exists():
            rows.extend(reader(json.loads(path.read_text())))
    for path in sorted(folder.glob("gpu-*.json")):
        from gpu.suite import rows_of as gpu_rows  # torch enters here

        found = json.loads(path.read_text())
        rows.extend((f"{found['gpu']}: {row[0]}", *row[1:]) for row in gpu_rows(found["sections"]))
    return rows


def as_markdown(rows: list[Row]) -> str:
    lines = ["| measured | figure | target | reached |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[Row]:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args, _ = options.parse_known_args(argv)  # `make bench` gives all programs the same options
    rows = rows_of(args.out)
    print_table(["measured", "figure", "target", "reached"], [list(row) for row in rows])
    if rows:
        (args.out / "TABLE.md").write_text(as_markdown(rows))
    return rows


if __name__ == "__main__":
    main()
