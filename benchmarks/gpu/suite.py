"""Everything that needs a real GPU, in one program that stops before nine minutes are over.

Correctness comes first; then what is measured, each figure beside its limit or peer in the same
run; a table last. Every section's result is written when it ends, so that `--resume` goes on where
a run was cut off. A section for which the time that is left is too short is left out, and said so.

    python benchmarks/gpu/suite.py [--sections correctness,decode] [--resume] [--budget 520]
        [--out benchmarks/results] [--dry-run]

With `--dry-run` all sections run on the CPU with tiny shapes: arguments, imports and the code of
every section, but no result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)] + (
    [str(HERE.parent.parent)] if "tierkv" not in sys.modules else []
)

import torch  # noqa: E402
from common.machine import describe  # noqa: E402
from common.runs import RESULTS, print_table  # noqa: E402

from gpu import attention, correctness, engine, limits, moves, small_ops  # noqa: E402
from gpu.setup import Row, Rows, Setup  # noqa: E402


@dataclass(slots=True, frozen=True)
class Section:
    """One question.

    Attributes:
        run: measures; its result is plain numbers.
        rows: the result as rows of the table.
        expected_s: seconds that it is expected to take on a GPU.
    """

    run: Callable[[Setup], dict[str, Any]]
    rows: Callable[[dict[str, Any]], Rows]
    expected_s: float


SECTIONS = {
    "limits": Section(limits.run, limits.rows, 10),
    "correctness": Section(correctness.run, correctness.rows, 70),
    "tokens": Section(engine.tokens, engine.tokens_rows, 130),
    "moved_bytes": Section(moves.check, moves.check_rows, 10),
    "decode": Section(attention.decode, attention.decode_rows, 40),
    "prefill": Section(attention.prefill, attention.prefill_rows, 40),
    "small_ops": Section(small_ops.run, small_ops.rows, 40),
    "layout": Section(attention.layout, attention.layout_rows, 20),
    "moves": Section(moves.rates, moves.rates_rows, 30),
    "small_model": Section(engine.small_model, engine.small_model_rows, 40),
    "large_model": Section(engine.large_model, engine.large_model_rows, 120),
    "first_token": Section(engine.first_token, engine.first_token_rows, 60),
    "working_set": Section(engine.working_set, engine.working_set_rows, 60),
    "store": Section(moves.store, moves.store_rows, 20),
}
"""In the order in which they run: what is wrong is known before anything is measured."""


def options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--sections", help=f"comma-separated, of {', '.join(SECTIONS)}; default: all")
    add("--resume", action="store_true", help="leave out the sections that --out has already")
    add("--budget", type=float, default=520, help="seconds; default 520")
    add("--dry-run", action="store_true", help="tiny shapes on the CPU: would it run?")
    add("--out", type=Path, default=RESULTS, help="folder of gpu-<name of the GPU>.json")
    return result


def chosen_sections(text: str | None) -> dict[str, Section]:
    """Those that were asked for, in the suite's order."""
    names = list(SECTIONS) if text is None else text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise SystemExit(f"--sections: {unknown[0]!r} is none of {', '.join(SECTIONS)}")
    return {name: section for name, section in SECTIONS.items() if name in names}


def device_of(args: argparse.Namespace) -> torch.device:
    if args.dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: run it where there is one, or with --dry-run")
    return torch.device("cuda")


def file_of(args: argparse.Namespace, device: torch.device) -> Path | None:
    if args.dry_run:
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return Path(args.out) / f"gpu-{name}.json"


def run_section(section: Section, setup: Setup) -> dict[str, Any]:
    """Its result, or how it failed; either way how long it took."""
    start = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        found = {"result": section.run(setup)}
        setup.synchronize()  # what went wrong on the device shows here at the latest
    except Exception as error:  # the other sections are worth their time all the same
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    try:
        engine.free_memory(setup)
    except RuntimeError as error:  # from now on the device refuses everything; say it, go on
        found = {"failed": found.get("failed", f"{type(error).__name__}: {error}")}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def rows_of(sections: dict[str, Any]) -> list[Row]:
    """The table: of each section its rows, or why there are none."""
    table: list[Row] = []
    for name, entry in sections.items():
        if "result" in entry:
            table.extend(SECTIONS[name].rows(entry["result"]))
        else:
            table.append((name, entry.get("failed") or entry["left_out"], "", ""))
    return table


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def earlier(path: Path | None) -> dict[str, Any]:
    """Sections that an earlier run has measured."""
    if path is None or not path.exists():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text())["sections"]
    return {name: entry for name, entry in sections.items() if "result" in entry}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = options().parse_args(argv)
    sections = chosen_sections(args.sections)
    device = device_of(args)
    path = file_of(args, device)
    done = earlier(path) if args.resume else {}
    result = {"benchmark": "gpu", **describe(), **describe_gpu(device), "sections": done}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        limits_found = done.get("limits", {}).get("result", {})
        setup = Setup(device, args.dry_run, Path(folder), dict(limits_found))
        for name, section in sections.items():
            if name in done:
                continue
            left = args.budget - (time.perf_counter() - begun)
            print(f"== {name} ({left:.0f} s left)", flush=True)
            if not args.dry_run and left < section.expected_s:
                done[name] = {"left_out": f"left out: {left:.0f} s were left"}
            else:
                done[name] = run_section(section, setup)
            write(path, result)
    show(done, args)
    return result


def show(sections: dict[str, Any], args: argparse.Namespace) -> None:
    """The table of all figures; of a dry run only which sections ran."""
    table = [list(row) for row in rows_of(sections)]
    if not args.dry_run:
        print_table(["on a GPU", "figure", "target", "met"], table)
        return
    rows: list[list[object]] = [
        [name, entry.get("failed", "ran"), entry["seconds"]] for name, entry in sections.items()
    ]
    print_table(["dry run on the CPU, no result", "", "s"], rows)


def is_wrong(entry: dict[str, Any]) -> bool:
    """Whether a section failed, or found something that is not as it has to be."""
    return "failed" in entry or bool(entry.get("result", {}).get("wrong"))


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Which GPU, its driver's CUDA version, and when."""
    if device.type != "cuda":
        return {"gpu": "none (dry run)"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "measured_at": datetime.now(UTC).isoformat(timespec="minutes"),
    }


if __name__ == "__main__":
    sys.exit(any(map(is_wrong, main()["sections"].values())))
