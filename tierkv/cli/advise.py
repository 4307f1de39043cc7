"""`tierkv advise`: which configuration to run for a trace, and why.

It simulates the engine's defaults on all tiers that you have, every single change of them, and the
changes that helped together; docs/simulation.md says what a simulation can tell.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tierkv.cli.options import (
    Parser,
    add_config_flag,
    add_flags,
    flag_name,
    read_options,
    split_options,
)
from tierkv.cli.plan import size_text, table
from tierkv.cli.sim_options import Bar, LabOptions, Setting, describe, read_setting, setting_dict
from tierkv.config import EngineConfig, option
from tierkv.sim.advise import CHANGES, Advice, advice, combination, single_changes
from tierkv.sim.machine import Machine
from tierkv.sim.sizes import parse_tiers
from tierkv.sim.study import Outcome, Study, run_study
from tierkv.sim.trace_formats import ReadOptions
from tierkv.types import TierName

EXAMPLES = """\
examples:
  tierkv advise --trace agents --requests 2000 --hardware h100:drives=2
  tierkv advise --trace hour.jsonl.gz --model ./my-model --tiers gpu=auto,cpu=64GiB
"""
MOST_SHOWN = 20


@dataclass(slots=True, kw_only=True)
class AdviseOptions(LabOptions):
    """Options of `tierkv advise`."""

    tiers: str = option("gpu=auto,cpu=64GiB,nvme=1TB", "what there is at most; 0 for none")


def make_parser() -> Parser:
    """The parser of `tierkv advise`."""
    parser = Parser(prog="tierkv advise", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    add_config_flag(parser)
    add_flags(parser, AdviseOptions)
    add_flags(parser.add_argument_group("reading the trace"), ReadOptions)
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Try and tell."""
    read, values = split_options(read_options(namespace, AdviseOptions, ReadOptions), ReadOptions)
    options = AdviseOptions(**values)
    setting = read_setting(options, ReadOptions(**read))
    blocks = parse_tiers(options.tiers, setting.units)
    block_size = setting.stats.block_size
    machine = Machine(setting.shape, setting.hardware, block_size, blocks, setting.engine)
    if not options.json:
        print(describe(setting), flush=True)
    found = find_advice(machine, setting, options)
    if options.json:
        print(json.dumps(as_dict(found, setting), indent=1, sort_keys=True))
    else:
        print(report(found, setting))
    return 0


def find_advice(machine: Machine, setting: Setting, options: AdviseOptions) -> Advice:
    """Simulate the single changes, then what helped together."""
    cases = single_changes(machine, setting.load, engine_defaults())
    bar = Bar(setting.stats.requests * (len(cases) + 1))
    try:
        outcomes = _run(cases, setting, options, bar)
        together = combination(outcomes)
        if together is not None:
            outcomes += _run([together], setting, options, bar)
    finally:
        bar.close()
    return advice(outcomes)


def _run(cases: Sequence[Any], setting: Setting, options: AdviseOptions, bar: Bar) -> list[Outcome]:
    study = Study(setting.source, cases, options.slo, with_optimum=False)
    return run_study(study, options.num_jobs, bar.add)


def engine_defaults() -> dict[str, Any]:
    """What the engine does unless it is told otherwise."""
    return {f.name: f.default for f in dataclasses.fields(EngineConfig) if f.name in CHANGES}


def report(found: Advice, setting: Setting) -> str:
    """The advice in words."""
    best, base = found.best, found.base
    lines = [
        "",
        "run:",
        f"  {command(best, setting)}",
        f"  {summary(best)}",
        "runner-up:",
        f"  {name_of(found.runner_up)}: {summary(found.runner_up)}",
        f"  {difference(found.runner_up, best)}",
    ]
    if best is not base:
        lines += [f"the defaults: {summary(base)}", f"  {difference(base, best)}"]
    lines += ["what each change does to the defaults, best first:", ranking(found)]
    return "\n".join(lines)


def command(outcome: Outcome, setting: Setting) -> str:
    """The command line that runs it; sizes of tiers in bytes."""
    machine = outcome.case.machine
    parts = [f"tierkv serve --model {setting.shape.name}"]
    lower = {t: n for t, n in machine.blocks.items() if t is not TierName.GPU}
    sizes = [f"{tier.value}={count * machine.slot_bytes}" for tier, count in lower.items()]
    parts += [f"--offload {','.join(sizes)}"] if sizes else ["--no-offload"]
    defaults = engine_defaults()
    for name, value in machine.options.items():
        if name in defaults and value != defaults[name]:
            parts.append(f"{flag_name(name)} {value}")
    return " ".join(parts)


def summary(outcome: Outcome) -> str:
    """Its figures in one line."""
    found = outcome.measures
    ttft = found.ttft_s
    return (
        f"{found.goodput:.3g} good requests/s ({100 * found.good_share:.1f} % good), TTFT"
        f" {ttft['p50']:.2f}/{ttft['p90']:.2f}/{ttft['p99']:.2f} s (p50/p90/p99),"
        f" {100 * found.hit_rate:.1f} % of prompt tokens hit"
    )


def difference(worse: Outcome, better: Outcome) -> str:
    """Why the one is behind the other."""
    a, b = worse.measures, better.measures
    reasons = [
        f"{100 * (a.goodput / b.goodput - 1):+.1f} % goodput" if b.goodput else "",
        f"{a.ttft_s['mean'] - b.ttft_s['mean']:+.2f} s of mean TTFT",
        f"{100 * (a.hit_rate - b.hit_rate):+.1f} points of hit rate",
        f"{(a.nvme_written_bytes - b.nvme_written_bytes) / 1e9:+,.0f} GB written to NVMe",
    ]
    return "compared with it: " + ", ".join(filter(None, reasons))


def name_of(outcome: Outcome) -> str:
    return outcome.case.labels["change"]


def ranking(found: Advice) -> str:
    """All that was tried."""
    rows = [["change", "good/s", "mean TTFT s", "hit %", "moved up", "written to NVMe"]]
    for outcome in found.others[:MOST_SHOWN]:
        measures = outcome.measures
        rows.append(
            [
                name_of(outcome),
                f"{measures.goodput:.3g}",
                f"{measures.ttft_s['mean']:.2f}",
                f"{100 * measures.hit_rate:.1f}",
                size_text(measures.promoted_bytes),
                size_text(measures.nvme_written_bytes),
            ]
        )
    return table(rows)


def as_dict(found: Advice, setting: Setting) -> Mapping[str, Any]:
    """The advice as plain numbers."""
    return {
        "setting": setting_dict(setting),
        "command": command(found.best, setting),
        "best": found.best.as_dict(),
        "runner_up": found.runner_up.as_dict(),
        "defaults": found.base.as_dict(),
        "tried": [outcome.as_dict() for outcome in found.others],
    }
