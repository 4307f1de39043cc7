"""What `tierkv simulate` and `tierkv advise` have in common: the trace, the model, the machine."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any

from tierkv.cache.layout import DTYPE_BITS
from tierkv.cli.model_facts import ModelFacts, read_facts
from tierkv.config import option
from tierkv.errors import ConfigError
from tierkv.sim.hardware import Hardware, load_hardware
from tierkv.sim.measures import Slo
from tierkv.sim.replay import Load
from tierkv.sim.sizes import Units, auto_gpu_blocks
from tierkv.sim.source import Source
from tierkv.sim.steps import ModelShape
from tierkv.sim.trace_formats import ReadOptions
from tierkv.sim.trace_lines import Problem
from tierkv.sim.trace_stats import TraceStats, trace_stats
from tierkv.sim.traces import MOST_PROBLEMS

MOST_SHOWN = 10


@dataclass(slots=True, kw_only=True)
class LabOptions:
    """Options of both commands.

    Raises:
        ConfigError: a value is out of range.
    """

    trace: str = option("", "trace file, or a generated workload: chat, agents, rag, coding")
    model: str = option(
        "llama-3.1-8b", "model directory, config.json, cached hub id or well-known name"
    )
    hardware: str = option(
        "h200", "machine, e.g. h100:tp=2,link=pcie5,drives=4, or a file of `tierkv calibrate`"
    )
    requests: int | None = option(None, "requests, from the start (default: all; workloads 10,000)")
    coarsen: int | None = option(
        None, "simulate larger blocks of so many tokens, a multiple of the trace's: faster"
    )
    max_bad_lines: int = option(MOST_PROBLEMS, "bad lines that a trace may have; they are skipped")
    slo_ttft: float = option(10.0, "seconds until the first token that a good request takes")
    slo_tpot: float = option(0.1, "seconds per further token that a good request takes")
    kv_hints: bool = option(True, "requests tell their session and what their answer is for")
    output_reuse: bool = option(True, "answers come back in the session's next prompt")
    context_limit: bool = option(True, "leave out requests longer than the model's positions")
    max_num_seqs: int = option(256, "sequences running at once, at most")
    max_num_batched_tokens: int = option(2048, "tokens in one step, at most")
    jobs: int | None = option(None, "processes (default: one for each core)")
    json: bool = option(False, "print JSON instead of tables")

    def __post_init__(self) -> None:
        if not self.trace:
            fix = "name a trace file, or one of chat, agents, rag, coding"
            raise ConfigError("trace", self.trace, fix)
        for name in ("requests", "coarsen", "jobs", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")
        for name in ("slo_ttft", "slo_tpot"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be above 0 seconds")

    @property
    def slo(self) -> Slo:
        return Slo(self.slo_ttft, self.slo_tpot)

    @property
    def num_jobs(self) -> int:
        return self.jobs or len(os.sched_getaffinity(0))


@dataclass(slots=True)
class Setting:
    """What is simulated, read and checked.

    Attributes:
        source, stats: the trace, and what it is like; num_bad: lines of it that were skipped.
        facts, shape, hardware: model and machine.
        units: for sizes of tiers.
        load: how the trace is played, at its own rate.
        engine: engine options that do not vary.
    """

    source: Source
    stats: TraceStats
    num_bad: int
    facts: ModelFacts
    shape: ModelShape
    hardware: Hardware
    units: Units
    load: Load
    engine: dict[str, Any]


def read_setting(options: LabOptions, read: ReadOptions) -> Setting:
    """Read the trace once, and all else.

    Raises:
        ConfigError: of any of them.
    """
    facts, hardware = read_facts(options.model), load_hardware(options.hardware)
    shape = shape_of(facts)
    source = Source(
        options.trace,
        read,
        options.requests,
        options.coarsen,
        options.max_bad_lines,
        read.seed,
    )
    problems = _Problems()
    trace = source.open(problems.add)
    stats = trace_stats(trace)
    problems.finish()
    units = Units(
        shape.kv_bytes_per_token * trace.block_size,
        stats.unique_blocks,
        auto_gpu_blocks(shape, hardware, trace.block_size),
    )
    load = Load(
        max_tokens=shape.max_model_len if options.context_limit else None,
        reuses_outputs=options.output_reuse,
        has_hints=options.kv_hints,
    )
    engine = {
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
    }
    return Setting(source, stats, problems.count, facts, shape, hardware, units, load, engine)


def shape_of(facts: ModelFacts) -> ModelShape:
    """What the cost of a model depends on; its windows, if it has any, are taken for none."""
    return ModelShape(
        name=facts.name,
        num_layers=facts.num_layers,
        num_heads=facts.num_heads,
        head_dim=facts.head_dim,
        num_parameters=facts.weights_bytes * 8 // DTYPE_BITS[facts.kv_dtype],
        weight_bytes=facts.weights_bytes,
        kv_bytes_per_token=facts.layout(facts.kv_dtype, 16).bytes_per_token,
        max_model_len=facts.context,
    )


def describe(setting: Setting) -> str:
    """What is simulated, in lines for people."""
    stats, shape = setting.stats, setting.shape
    lines = [
        f"{stats.name}: {stats.requests:,} requests in {stats.span_s:,.0f} s,"
        f" {stats.input_tokens.mean:,.0f} tokens in and {stats.output_tokens.mean:,.0f} out each,"
        f" {stats.unique_blocks:,} distinct blocks of {stats.block_size} tokens;"
        f" a cache that never evicts hits {100 * stats.hit_rate:.1f} %",
        f"{shape.name} on {setting.hardware.name}: {shape.kv_bytes_per_token / 1024:,.0f} KiB of KV"
        f" a token, {setting.units.slot_bytes / 2**20:,.1f} MiB a block",
    ]
    if setting.num_bad:
        lines.append(f"{setting.num_bad:,} bad lines of the trace were skipped")
    if any(setting.facts.windows):
        lines.append("note: the model's sliding windows are not simulated: costs are upper bounds")
    return "\n".join(lines)


class Bar:
    """Progress over all requests of all cases, on a terminal's stderr."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, unit=" requests", file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def add(self, count: int) -> None:
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()


class _Problems:
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


def setting_dict(setting: Setting) -> dict[str, Any]:
    """The setting as plain numbers."""
    return {
        "trace": dataclasses.asdict(setting.stats) | {"bad_lines": setting.num_bad},
        "model": dataclasses.asdict(setting.shape),
        "hardware": dataclasses.asdict(setting.hardware),
        "slot_bytes": setting.units.slot_bytes,
    }
