"""Does any seed break a law? Deterministic fault simulation of the real engine in virtual time.

Each seed stands for an engine (pools too small for the work, any policies, up to three tiers) and
for a history: requests that share prefixes, conversations, parallel samples, aborts, sleep, pins,
quotas, exports, resets, restarts over what a crash left, and moves that fail in every way, come
too late, or never. After every step all conservation laws are checked, every block that is read
is compared with what it must hold, and every token with the one that it must be; at the end all
requests have ended and nothing is held.

    python benchmarks/chaos.py [--quick] [--seeds 10000] [--start 0] [--jobs 2] [--steps 40]
    python benchmarks/chaos.py --seed 4711 --verbose       one seed, with its log
    python benchmarks/chaos.py --seed 4711 --shrink        the shortest history that still fails
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from common.runs import parse, parser, print_table, write

from tierkv.sim.chaos.seeds import NUM_OPS, Outcome, run_seed, shrink

_MOST_SHOWN = 20
_BATCH = 25
_NEWS = 1000


def options() -> argparse.ArgumentParser:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--seeds", type=int, default=10_000, help="how many")
    arguments.add_argument("--start", type=int, default=0, help="the first")
    arguments.add_argument("--jobs", type=int, default=2, help="processes")
    arguments.add_argument("--steps", type=int, default=NUM_OPS, help="operations of a history")
    arguments.add_argument("--seed", type=int, help="only this one")
    arguments.add_argument("--keep", help="with --seed: only these operations, as in 3,7,8")
    arguments.add_argument("--verbose", action="store_true", help="with --seed: show the log")
    arguments.add_argument("--shrink", action="store_true", help="with --seed: shorten the history")
    return arguments


def outcomes(seeds: range, jobs: int, num_ops: int) -> Iterator[Outcome]:
    """Of all seeds, in their order."""
    play = partial(run_seed, num_ops=num_ops)
    if jobs == 1:
        yield from map(play, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(play, seeds, chunksize=_BATCH)


def play_many(args: argparse.Namespace) -> dict[str, Any]:
    """Run all seeds; returns the summary."""
    start = time.perf_counter()
    totals: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    for outcome in outcomes(range(args.start, args.start + args.seeds), args.jobs, args.steps):
        totals += outcome.counts
        if (number := outcome.seed - args.start + 1) % _NEWS == 0:
            print(f"{number} of {args.seeds} seeds", flush=True)
        if outcome.failure:
            failures.append({"seed": outcome.seed, "failure": outcome.failure})
            print(f"seed {outcome.seed}: {outcome.failure}")
            print(f"    {replay_command(outcome.seed, args.steps)}", flush=True)
    return {
        "seeds": args.seeds,
        "start": args.start,
        "operations": args.steps,
        "failed": len(failures),
        "failures": failures[:_MOST_SHOWN],
        "seconds": round(time.perf_counter() - start, 1),
        "totals": dict(sorted(totals.items())),
    }


def replay_command(seed: int, num_ops: int, keep: list[int] | None = None) -> str:
    words = f"python benchmarks/chaos.py --seed {seed}"
    words += f" --steps {num_ops}" if num_ops != NUM_OPS else ""
    words += f" --keep {','.join(map(str, keep))}" if keep is not None else ""
    return f"{words} --verbose"


def play_one(args: argparse.Namespace) -> dict[str, Any]:
    """Run one seed and show it."""
    keep = [int(number) for number in args.keep.split(",")] if args.keep else None
    if args.shrink:
        keep = shrink(args.seed, args.steps)
        print(replay_command(args.seed, args.steps, keep))
    outcome = run_seed(args.seed, args.steps, keep=keep, has_lines=args.verbose)
    print(*outcome.lines, sep="\n")
    print(outcome.trace or f"seed {args.seed}: no law was broken")
    print(f"{outcome.num_ops} operations, log {outcome.digest}")
    return {"failed": int(bool(outcome.failure)), "digest": outcome.digest}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(options(), argv)
    if args.seed is not None:
        return play_one(args)
    if args.quick:
        args.seeds, args.jobs = min(args.seeds, 50), 1
    result = write(args.out, "chaos", play_many(args))
    print_table(["what", "times"], [[name, count] for name, count in result["totals"].items()])
    print(f"{result['seeds']} seeds, {result['failed']} failed, {result['seconds']} s")
    return result


if __name__ == "__main__":
    logging.getLogger("tierkv").setLevel(logging.ERROR)  # sick tiers are what is wanted here
    raise SystemExit(main()["failed"] > 0)
