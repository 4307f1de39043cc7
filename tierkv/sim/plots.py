"""Plots of a study's outcomes; they need matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError
from tierkv.sim.study import Outcome

_SIZE = (7.0, 4.2)


def write_plots(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write those that the outcomes have something for: hit rate against capacity, TTFT, bytes
    moved, goodput against load.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = find_pyplot()
    plots: dict[str, Callable[[Any, Sequence[Outcome]], bool]] = {
        "hit_rate": _hit_rate,
        "ttft": _ttft,
        "bytes": _bytes,
        "goodput": _goodput,
    }
    written = []
    for name, draw in plots.items():
        drawing, axes = figure(figsize=_SIZE, layout="constrained")
        if draw(axes, outcomes):
            path = folder / f"{name}.png"
            drawing.savefig(path, dpi=120)
            written.append(path)
    return written


def find_pyplot() -> Any:
    """What makes a figure.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        fix = "plots need matplotlib: pip install 'tierkv[bench]', or --no-plots"
        raise ConfigError("plots", True, fix) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots


def _lines(outcomes: Sequence[Outcome], without: str) -> dict[str, list[Outcome]]:
    """Outcomes that differ in one label only, by what the others say."""
    lines: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        labels = {n: v for n, v in outcome.case.labels.items() if n != without}
        lines[" ".join(labels.values()) or "this configuration"].append(outcome)
    return lines


def _hit_rate(axes: Any, outcomes: Sequence[Outcome]) -> bool:
    best: dict[int, float] = {}
    for name, line in _lines(outcomes, "tiers").items():
        points = sorted((o.case.num_blocks, 100 * o.measures.hit_rate) for o in line)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
        best |= {
            o.case.num_blocks: 100 * o.optimum_hit_rate
            for o in line
            if o.optimum_hit_rate is not None
        }
    if best:
        axes.plot(*zip(*sorted(best.items()), strict=True), "k--", marker="x", label="optimum")
    axes.set_xscale("log")
    axes.set(xlabel="blocks of all tiers", ylabel="prompt tokens hit, %")
    axes.legend(fontsize="small")
    return True


def _ttft(axes: Any, outcomes: Sequence[Outcome]) -> bool:
    for outcome in outcomes:
        if outcome.measures.ttft_cdf:
            seconds, shares = zip(*outcome.measures.ttft_cdf, strict=True)
            axes.plot(seconds, [100 * share for share in shares], label=outcome.case.name)
    axes.set_xscale("log")
    axes.set(xlabel="time to first token, s", ylabel="requests, %")
    axes.legend(fontsize="x-small")
    return True


def _bytes(axes: Any, outcomes: Sequence[Outcome]) -> bool:
    names = [outcome.case.name for outcome in outcomes]
    places = range(len(names))
    for offset, (label, field) in enumerate(
        {
            "up": "promoted_bytes",
            "down": "demoted_bytes",
            "written to NVMe": "nvme_written_bytes",
        }.items()
    ):
        values = [getattr(outcome.measures, field) / 1e9 for outcome in outcomes]
        axes.barh([place + 0.27 * (offset - 1) for place in places], values, 0.27, label=label)
    axes.set_yticks(list(places), names, fontsize="x-small")
    axes.set_xlabel("moved, GB")
    axes.legend(fontsize="small")
    return any(o.measures.promoted_bytes or o.measures.demoted_bytes for o in outcomes)


def _goodput(axes: Any, outcomes: Sequence[Outcome]) -> bool:
    rates = {outcome.case.load.rate for outcome in outcomes}
    for name, line in _lines(outcomes, "rate").items():
        points = sorted((o.case.load.rate, o.measures.goodput) for o in line)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="load, times the trace's rate", ylabel="good requests per second")
    axes.legend(fontsize="small")
    return len(rates) > 1
