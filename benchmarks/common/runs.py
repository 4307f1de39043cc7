"""Alternating runs and what is reported of them."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.machine import Load, describe, wait_for_quiet

RESULTS = Path(__file__).resolve().parent.parent / "results"
QUIET_CORES = 0.25
"""A run counts as quiet when other processes used less than this meanwhile."""


@dataclass(slots=True)
class Samples:
    """Seconds of repeated runs of one system, and what else each run reported.

    Attributes:
        seconds: of each run, in order.
        others: cores that other processes used during each run.
        notes: figures of the last run.
    """

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        """Of the quiet runs if there are any, else of all."""
        pairs = zip(self.seconds, self.others, strict=True)
        quiet = [seconds for seconds, others in pairs if others < QUIET_CORES]
        return statistics.median(quiet or self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "median_s": round(self.median_s, 4),
            "runs_s": [round(s, 4) for s in self.seconds],
            "others_cores": [round(o, 2) for o in self.others],
            **self.notes,
        }


Run = Callable[[], dict[str, Any]]
"""One run of one system; returns figures to note. `_seconds` replaces the measured time."""


def alternate(
    systems: dict[str, Run], repeats: int, *, warm: bool = True, quiet_s: float = 20.0
) -> dict[str, Samples]:
    """Run all systems in turn, `repeats` times, in an order that reverses each time.

    Args:
        systems: by name.
        repeats: measured runs of each.
        warm: run each once before, unmeasured.
        quiet_s: how long to wait, before each run, for other processes to become idle.
    """
    samples = {name: Samples() for name in systems}
    if warm:
        for run in systems.values():
            run()
    names = list(systems)
    for _ in range(repeats):
        for name in names:
            gc.collect()
            wait_for_quiet(quiet_s)
            _measure(systems[name], samples[name])
        names.reverse()
    return samples


def _measure(run: Run, samples: Samples) -> None:
    load, start = Load.now(), time.perf_counter()
    notes = run()
    elapsed = time.perf_counter() - start
    samples.seconds.append(notes.pop("_seconds", elapsed))
    samples.others.append(load.others())
    samples.notes = notes


def parser(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every program has."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="tiny models: does it run at all?")
    result.add_argument("--repeats", type=int, default=repeats, help="measured runs of each system")
    result.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and PNG")
    return result


def parse(arguments: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse; `--quick` runs everything once and waits for nobody."""
    args = arguments.parse_args(argv)
    args.quiet_s = 0.0 if args.quick else 20.0
    if args.quick:
        args.repeats = 1
        if args.out == RESULTS:
            args.out = None
    return args


def write(out: Path | None, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Add the machine to `result`, write it as `name`.json (not for `--quick`), and return it."""
    full = {"benchmark": name, **describe(), **result}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(full, indent=1) + "\n")
    return full


def print_table(header: list[str], rows: list[list[object]]) -> None:
    """A table with columns as wide as they need to be; numbers to the right."""
    cells = [header, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        first = row[0].ljust(widths[0])
        print("  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


def _cell(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
