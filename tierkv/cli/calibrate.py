"""`tierkv calibrate`: measure this machine, for `tierkv simulate --hardware FILE`.

It loads the model, times steps of the engine on prompts and batches of many sizes, and moves blocks
between the tiers. What it writes describes this model on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierkv.cli.options import (
    Parser,
    add_config_flag,
    add_flags,
    read_options,
    split_options,
    take_model,
)
from tierkv.config import EngineConfig, option
from tierkv.errors import ConfigError
from tierkv.sim.fit import errors_of, fit_table
from tierkv.sim.measure_steps import measure_steps, workloads

if TYPE_CHECKING:
    from tierkv.engine.measure_links import LinkRates
    from tierkv.sim.hardware import StepTable

EXAMPLES = """\
examples:
  tierkv calibrate ./my-model --out my-machine.yaml --nvme-path /mnt/nvme
  tierkv simulate --trace chat --model ./my-model --hardware my-machine.yaml --tiers gpu=2GiB
"""


@dataclass(slots=True, kw_only=True)
class CalibrateOptions:
    """Options of `tierkv calibrate`."""

    out: str = option("machine.yaml", "file to write", metavar="FILE.yaml")
    rounds: int = option(2, "how often each step is timed")
    drive: bool = option(True, "measure the drive of --nvme-path too (writes some 500 MB there)")

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError("rounds", self.rounds, "must be at least 1")


def make_parser() -> Parser:
    """The parser of `tierkv calibrate`."""
    parser = Parser(prog="tierkv calibrate", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    parser.add_argument("MODEL", nargs="?", help="as for `tierkv serve`")
    add_config_flag(parser)
    add_flags(parser, CalibrateOptions)
    add_flags(parser.add_argument_group("engine"), EngineConfig)
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Measure and write."""
    values: dict[str, Any] = read_options(namespace, CalibrateOptions, EngineConfig)
    take_model(namespace, values)
    mine, of_engine = split_options(values, CalibrateOptions)
    options = CalibrateOptions(**mine)
    path = Path(options.out).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.absolute().parent.is_dir():
        raise ConfigError("out", options.out, "name a .yaml file in a folder that exists")
    folder = _folder(of_engine) if options.drive else None
    config = EngineConfig(**{**of_engine, "offload": None, "enable_prefix_caching": False})
    table, middle, worst = _steps(config, options.rounds)
    links = _links(config, folder)
    path.write_text(as_yaml(config.model, table, links), encoding="utf-8")
    print(
        f"{path}: steps are off by {100 * middle:.1f} % in the median, {100 * worst:.1f} % at p90"
    )
    return 0


def _folder(values: dict[str, Any]) -> Path:
    from tierkv.engine.tiers import TierRequest, store_path

    return store_path(EngineConfig(**values), TierRequest())


def _steps(config: EngineConfig, rounds: int) -> tuple[StepTable, float, float]:
    """The table, and its error at the median and at p90."""
    from tqdm import tqdm

    from tierkv.engine.core import EngineCore

    core = EngineCore.from_config(config)
    try:
        total = len(workloads(core)) * (rounds + 1)
        with tqdm(total=total, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            samples = measure_steps(core, rounds, bar.update)
    finally:
        core.close()
    table = fit_table(samples)
    errors = errors_of(table, samples)
    return table, errors[len(errors) // 2], errors[len(errors) * 9 // 10]


def _links(config: EngineConfig, folder: Path | None) -> LinkRates:
    from tierkv.cache.layout import KVLayout
    from tierkv.engine.measure_links import measure_links
    from tierkv.model.loader import load_model

    loaded = load_model(dataclasses.replace(config, verify_model=False))
    layout: KVLayout = loaded.layout(config.block_size)
    return measure_links(layout, loaded.device.type, folder)


def as_yaml(model: str, table: StepTable, links: LinkRates) -> str:
    """The file."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    values: dict[str, Any] = {
        "flops": 0,
        "bandwidth": 0,
        "memory": 0,
        "interconnect": 0,
        "link": _mapping(bandwidth=min(links.up, links.down), both=links.both, s=links.latency_s),
        "drive": "gen4",
        "table": "{"
        + ", ".join(f"{n}: {v:.6g}" for n, v in dataclasses.asdict(table).items())
        + "}",
        "measured_model": model,
    }
    if links.read:
        values["drive"] = _mapping(read=links.read, write=links.write, s=links.drive_latency_s)
    lines = [
        f"# Measured by `tierkv calibrate` with {model} on {date} ({machine}).",
        "# Steps in seconds, of this model alone; bytes per second between the tiers.",
        *(f"{name}: {value}" for name, value in values.items()),
    ]
    return "\n".join(lines) + "\n"


def _mapping(s: float, **rates: float) -> str:
    return _numbers({**rates, "latency_s": s})


def _numbers(values: dict[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.6g}" for name, value in values.items()) + "}"
