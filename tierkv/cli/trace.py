"""`tierkv trace ACTION`: traces of requests, for `tierkv simulate` (`docs/traces.md`).

`info` says what a trace is like and which of its lines are bad; `convert` rewrites one in the
run-length format; `generate` makes a workload; `record` writes what a running server is asked, as
lengths and hashed blocks, without any text (it needs the key of an administrator).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tierkv.cli.kv import Server
from tierkv.cli.options import CommandError, Parser, add_flags
from tierkv.cli.plan import table
from tierkv.cli.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE
from tierkv.cli.top import checked_key
from tierkv.cli.trace_record import record
from tierkv.errors import ConfigError
from tierkv.sim.generate import generate_trace
from tierkv.sim.trace import Trace
from tierkv.sim.trace_formats import ReadOptions
from tierkv.sim.trace_lines import Problem
from tierkv.sim.trace_stats import WINDOW_S, Spread, TraceStats, trace_stats
from tierkv.sim.trace_writer import new_file, write_trace
from tierkv.sim.traces import MOST_PROBLEMS, read_trace
from tierkv.sim.workloads import WORKLOADS, Workload

EXAMPLES = """\
examples:
  tierkv trace info conversation_trace.jsonl
  tierkv trace convert azure.csv --shared-prefix-tokens 500 --out azure.jsonl.gz
  tierkv trace generate agents --requests 100000 --session-rate 0.5 --out agents.jsonl.gz
  TIERKV_ADMIN_API_KEY=... tierkv trace record --duration 3600 --out hour.jsonl.gz
"""
MOST_SHOWN = 10
ADDRESS = "http://127.0.0.1:8000"


class ActionParser(Parser):
    """Of one action: it knows its own flags best."""

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, extras = super().parse_known_args(args, namespace)
        if extras:
            self.refuse(extras)
        return found, extras


class Problems:
    """Bad lines: the first ones are shown, all are counted."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, problem: Problem) -> None:
        self.count += 1
        if self.count <= MOST_SHOWN:
            print(f"skipped {problem}", file=sys.stderr)

    def finish(self) -> None:
        if self.count > MOST_SHOWN:
            print(f"... and {self.count - MOST_SHOWN:,} more", file=sys.stderr)


def opened(namespace: argparse.Namespace, problems: Problems) -> Trace:
    """The trace that is named, read as its flags say."""
    options = ReadOptions(**given(namespace, ReadOptions))
    return read_trace(
        namespace.FILE,
        limit=namespace.limit,
        options=options,
        on_problem=problems.add,
        most_problems=namespace.most_problems,
    )


def given(namespace: argparse.Namespace, owner: type) -> dict[str, Any]:
    """The options of a class that were given."""
    names = {f.name for f in dataclasses.fields(owner)}
    return {name: value for name, value in vars(namespace).items() if name in names}


def info(namespace: argparse.Namespace) -> None:
    """Say what a trace is like."""
    problems = Problems()
    found = trace_stats(opened(namespace, problems))
    problems.finish()
    if namespace.json:
        print(json.dumps(dataclasses.asdict(found) | {"bad_lines": problems.count}, indent=2))
    else:
        print(report(found, problems.count))


def convert(namespace: argparse.Namespace) -> None:
    """Rewrite a trace in the run-length format."""
    problems = Problems()
    trace = opened(namespace, problems)
    if Path(namespace.out).resolve() == Path(namespace.FILE).resolve():
        raise ConfigError("out", namespace.out, "is the trace itself: write another file")
    count = write_trace(trace, namespace.out)
    problems.finish()
    print(f"{namespace.out}: {count:,} requests; {problems.count:,} bad lines skipped")


def generate(namespace: argparse.Namespace) -> None:
    """Write a workload."""
    knobs = given(namespace, Workload)
    count, seed = namespace.requests, namespace.seed
    if count < 1:
        raise ConfigError("requests", count, "must be at least 1")
    trace = generate_trace(namespace.WORKLOAD, num_requests=count, seed=seed, **knobs)
    write_trace(trace, namespace.out)
    print(f"{namespace.out}: {count:,} requests of {namespace.WORKLOAD}, seed {seed}")


def record_server(namespace: argparse.Namespace) -> None:
    """Write what a server is asked, until Ctrl-C or for so many seconds."""
    if namespace.duration is not None and not namespace.duration > 0:
        raise ConfigError("duration", namespace.duration, "must be above 0")
    keys = [namespace.api_key, *map(os.environ.get, (ADMIN_KEY_VARIABLE, KEY_VARIABLE))]
    server = Server(namespace.url, checked_key(next((key for key in keys if key), None)))
    with new_file(Path(namespace.out).expanduser()) as file:
        found = record(server, file, namespace.duration)
    print(
        f"{namespace.out}: {found.num_written:,} requests; {found.num_running:,} were still"
        f" running and {found.num_dropped:,} were dropped by the server: they are not in it"
    )
    if found.reason:
        raise CommandError(f"the recording ended early: {found.reason}")


def report(stats: TraceStats, num_bad: int) -> str:
    """The numbers as text."""
    size = stats.block_size
    minutes = f"{WINDOW_S / 60:g} min"
    rows = [
        ["requests", f"{stats.requests:,}"],
        ["bad lines, skipped", f"{num_bad:,}"],
        ["sessions", f"{stats.sessions:,}" if stats.sessions else "not told"],
        ["tenants", f"{stats.tenants:,}" if stats.tenants else "not told"],
        ["span", f"{stats.span_s:,.0f} s"],
        ["tool calls / ends", f"{stats.tool_calls:,} / {stats.ends:,}"],
        ["tokens per block", f"{size:,}"],
        ["blocks of prompts", f"{stats.blocks:,}"],
        ["unique blocks", f"{stats.unique_blocks:,} ({stats.unique_blocks * size:,} tokens)"],
        ["of these used again", share(stats.reused_blocks, stats.unique_blocks)],
        ["hit rate, infinite cache", f"{stats.hit_rate:.1%} of prompt tokens"],
        [f"working set, {minutes}", f"{stats.working_set_blocks:,} blocks"],
    ]
    lengths = [["tokens", "mean", "median", "90 %", "99 %", "most"]]
    for name, spread in (("prompt", stats.input_tokens), ("answer", stats.output_tokens)):
        lengths.append([name, *spread_cells(spread)])
    return f"{stats.name}\n{table(rows)}\n\n{table(lengths)}"


def share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def spread_cells(spread: Spread) -> list[str]:
    rest = (spread.p50, spread.p90, spread.p99, spread.most)
    return [f"{spread.mean:,.0f}", *(f"{value:,}" for value in rest)]


ACTIONS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "info": (info, "what a trace is like, and which lines are bad"),
    "convert": (convert, "rewrite a trace in the run-length format"),
    "generate": (generate, "make a workload: " + ", ".join(WORKLOADS)),
    "record": (record_server, "write what a running server is asked"),
}


def make_parser() -> Parser:
    """The parser of `tierkv trace`."""
    description = (__doc__ or "").strip()
    parser = Parser(prog="tierkv trace", description=description, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="ACTION", required=True, parser_class=ActionParser)
    parsers = {name: actions.add_parser(name, help=text) for name, (_, text) in ACTIONS.items()}
    for name in ("info", "convert"):
        _add_read_flags(parsers[name])
    parsers["info"].add_argument("--json", action="store_true", help="as JSON")
    for name in ("convert", "generate", "record"):
        about = "where to; gzip if it ends in .gz"
        parsers[name].add_argument("--out", "-o", metavar="FILE", required=True, help=about)
    _add_generate_flags(parsers["generate"])
    _add_record_flags(parsers["record"])
    return parser


def _add_read_flags(parser: Parser) -> None:
    parser.add_argument("FILE", help="the trace: JSON lines or CSV, gzip or plain")
    parser.add_argument("--limit", type=int, metavar="N", help="requests to read (default: all)")
    about = f"bad lines that the file may have (default: {MOST_PROBLEMS})"
    number: dict[str, Any] = {"type": int, "metavar": "N", "default": MOST_PROBLEMS}
    parser.add_argument("--max-bad-lines", dest="most_problems", help=about, **number)
    add_flags(parser, ReadOptions)


def _add_generate_flags(parser: Parser) -> None:
    parser.add_argument("WORKLOAD", choices=WORKLOADS, help=", ".join(WORKLOADS))
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    add_flags(parser.add_argument_group("knobs; their defaults are the workload's"), Workload)


def _add_record_flags(parser: Parser) -> None:
    about_keys = f"an administrator's; also in ${ADMIN_KEY_VARIABLE}"
    parser.add_argument("--url", default=ADDRESS, help=f"the server's (default: {ADDRESS})")
    parser.add_argument("--api-key", metavar="KEY", help=about_keys)
    about = "how long (default: until Ctrl-C)"
    parser.add_argument("--duration", type=float, metavar="SECONDS", help=about)


def run(namespace: argparse.Namespace) -> int:
    """Do what the action says."""
    action, _ = ACTIONS[namespace.ACTION]
    try:
        action(namespace)
    except ConfigError as error:
        if error.option != "trace":
            raise
        raise CommandError(f"{error.value}: {error.fix}") from None
    sys.stdout.flush()
    return 0
