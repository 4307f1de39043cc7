"""`tierkv simulate`: a trace through the engine in virtual time, on hardware that need not be here.

Every list is alternatives, and all combinations run; what is not given is as the engine has it.
Policies are those of the engine itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tierkv.cli.options import Parser, add_config_flag, add_flags, read_options, split_options
from tierkv.cli.plan import table
from tierkv.cli.sim_options import (
    Bar,
    LabOptions,
    Setting,
    describe,
    read_setting,
    setting_dict,
)
from tierkv.config import option
from tierkv.errors import ConfigError
from tierkv.sim.cases import BASELINES, Choices, make_cases
from tierkv.sim.plots import find_pyplot, write_plots
from tierkv.sim.sizes import parse_tiers
from tierkv.sim.study import Outcome, Study, run_study
from tierkv.sim.trace_formats import ReadOptions

EXAMPLES = """\
examples:
  tierkv simulate --trace chat --tiers gpu=1% gpu=5% --eviction-policy lru,sieve,reuse
  tierkv simulate --trace agent.jsonl.gz --model llama-3.1-8b --hardware h200:drives=4 \\
      --tiers gpu=auto,cpu=256GiB,nvme=4TB --baseline vllm --rate 1 2 4 --out study/
"""

LISTS = (
    "eviction_policy",
    "preemption_mode",
    "prefetch_policy",
    "admission_policy",
    "load_policy",
    "scheduling_policy",
)


@dataclass(slots=True, kw_only=True)
class SimulateOptions(LabOptions):
    """Options of `tierkv simulate`."""

    tiers: list[str] | None = option(
        None, "sizes, gpu=auto,cpu=256GiB,nvme=4TB or gpu=5%; several sets", takes_several=True
    )
    eviction_policy: list[str] | None = option(
        None, "which block leaves first: a,b,c", takes_several=True
    )
    preemption_mode: list[str] | None = option(
        None, "how to preempt: recompute, swap, auto", takes_several=True
    )
    prefetch_policy: list[str] | None = option(
        None, "promote before its turn: none, queue, lookahead", takes_several=True
    )
    admission_policy: list[str] | None = option(
        None, "what enters a lower tier: write-through, second-hit, ...", takes_several=True
    )
    load_policy: list[str] | None = option(
        None, "for a hit below the pool: load, recompute, split, auto", takes_several=True
    )
    scheduling_policy: list[str] | None = option(
        None, "order of waiting requests: fcfs, priority, lpm, fair", takes_several=True
    )
    rate: list[float] | None = option(
        None, "times the trace's speed (default: 1)", takes_several=True, item=float
    )
    baseline: list[str] | None = option(
        None, f"also run as another engine would: {', '.join(BASELINES)}", takes_several=True
    )
    optimum: bool = option(True, "also find the offline optimum of each capacity")
    out: str | None = option(None, "folder for results.json and plots", metavar="DIR")
    plots: bool = option(True, "with --out: draw plots (needs matplotlib)")

    def __post_init__(self) -> None:
        LabOptions.__post_init__(self)
        for rate in self.rate or []:
            if not rate > 0:
                raise ConfigError("rate", rate, "must be above 0")


def alternatives(given: Sequence[str]) -> list[str]:
    """`a,b` are two policies; a text with `=` is one (`gpu=lru,cpu=sieve`, `s3fifo:small=0.1`)."""
    found = []
    for text in given:
        found += [text] if "=" in text else [part.strip() for part in text.split(",")]
    return list(dict.fromkeys(filter(None, found)))


def make_study(options: SimulateOptions, setting: Setting) -> Study:
    """The cases that the options ask for.

    Raises:
        ConfigError: of sizes, or a baseline that is none.
    """
    tiers = [(text, parse_tiers(text, setting.units)) for text in options.tiers or ["gpu=auto"]]
    chosen = {name: alternatives(getattr(options, name) or []) for name in LISTS}
    choices = Choices(
        tiers,
        {name: values for name, values in chosen.items() if values},
        options.rate or [1.0],
        alternatives(options.baseline or []),
    )
    block_size = setting.stats.block_size
    cases = make_cases(
        setting.shape, setting.hardware, block_size, choices, setting.engine, setting.load
    )
    return Study(setting.source, cases, options.slo, options.optimum)


Column = tuple[str, Callable[[Outcome], str]]

COLUMNS: list[Column] = [
    ("hit %", lambda o: f"{100 * o.measures.hit_rate:.1f}"),
    ("gpu/cpu/nvme", lambda o: _parts(o)),
    ("optimum", lambda o: _percent(o.optimum_hit_rate)),
    ("gap closed", lambda o: _percent(o.gap_closed)),
    ("TTFT p50/p90/p99 s", lambda o: _quantiles(o.measures.ttft_s, 1)),
    ("ITL ms", lambda o: _quantiles(o.measures.itl_s, 1000)),
    ("req/s", lambda o: f"{o.measures.requests_per_s:.3g}"),
    ("good/s", lambda o: f"{o.measures.goodput:.3g}"),
    ("good %", lambda o: f"{100 * o.measures.good_share:.1f}"),
    ("up GB", lambda o: f"{o.measures.promoted_bytes / 1e9:,.0f}"),
    ("down GB", lambda o: f"{o.measures.demoted_bytes / 1e9:,.0f}"),
    ("NVMe GB", lambda o: f"{o.measures.nvme_written_bytes / 1e9:,.0f}"),
    ("preempted", lambda o: f"{o.measures.preemptions:,}"),
]


def _parts(outcome: Outcome) -> str:
    found = outcome.measures
    rates = (found.hit_rate_gpu, found.hit_rate_cpu, found.hit_rate_nvme)
    return "/".join(f"{100 * rate:.0f}" for rate in rates)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _quantiles(values: dict[str, float], scale: float) -> str:
    return "/".join(f"{values[name] * scale:.3g}" for name in ("p50", "p90", "p99"))


def report(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table, and what they have in common."""
    rows = [["case", *(name for name, _ in COLUMNS)]]
    rows += [[o.case.name, *(text(o) for _, text in COLUMNS)] for o in outcomes]
    found = outcomes[0].measures
    excluded = f"; {found.num_excluded:,} left out as too long for all" * bool(found.num_excluded)
    return f"{table(rows)}\n{found.num_requests:,} requests ended{excluded}"


def results(outcomes: Sequence[Outcome], setting: Setting, options: SimulateOptions) -> str:
    """All of it as JSON; the same study gives the same bytes."""
    found = {
        "setting": setting_dict(setting),
        "slo": {"ttft_s": options.slo_ttft, "tpot_s": options.slo_tpot},
        "outcomes": [outcome.as_dict() for outcome in outcomes],
    }
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def make_parser() -> Parser:
    """The parser of `tierkv simulate`."""
    parser = Parser(prog="tierkv simulate", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    add_config_flag(parser)
    add_flags(parser, SimulateOptions)
    text = "the same as --admission-policy"
    parser.add_argument(
        "--admission", dest="admission_policy", action="extend", nargs="+", help=text,
        default=argparse.SUPPRESS, metavar="TEXT",
    )  # fmt: skip
    add_flags(parser.add_argument_group("reading the trace"), ReadOptions)
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Simulate and report."""
    read, values = split_options(read_options(namespace, SimulateOptions, ReadOptions), ReadOptions)
    options = SimulateOptions(**values)
    folder = Path(options.out).expanduser() if options.out is not None else None
    if folder is not None:
        make_folder(folder)
        if options.plots:
            find_pyplot()
    setting = read_setting(options, ReadOptions(**read))
    study = make_study(options, setting)
    if not options.json:
        print(describe(setting), flush=True)
    bar = Bar(setting.stats.requests * (len(study.cases) + options.optimum))
    try:
        outcomes = run_study(study, options.num_jobs, bar.add)
    finally:
        bar.close()
    text = results(outcomes, setting, options)
    print(text if options.json else report(outcomes))
    if folder is not None:
        write(folder, text, outcomes, options)
    return 0


def make_folder(folder: Path) -> None:
    """Have it before anything is computed.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", str(folder), f"cannot be made ({error.strerror})") from None


def write(folder: Path, text: str, outcomes: Sequence[Outcome], options: SimulateOptions) -> None:
    """Write results and plots; say where."""
    path = folder / "results.json"
    path.write_text(text, encoding="utf-8")
    written = [path]
    if options.plots:
        written += write_plots(outcomes, folder)
    if not options.json:
        print("written: " + ", ".join(map(str, written)))
