"""Small PNG plots without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

Series = dict[str, list[float]]


def lines(
    target: Path,
    x: Sequence[float],
    left: Series,
    *,
    title: str,
    left_label: str,
    x_label: str = "block size (tokens)",
    right: Series | None = None,
    right_label: str = "",
    floor: tuple[float, str] | None = None,
) -> None:
    """Lines over `x` (log scale); `right` has its own axis, `floor` a dashed line."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=100)
    for name, values in left.items():
        axes.plot(x, values, marker="o", label=name)
    if floor is not None:
        axes.axhline(floor[0], linestyle="--", color="grey", linewidth=1, label=floor[1])
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x_label, ylabel=left_label, title=title)
    handles, labels = axes.get_legend_handles_labels()
    if right:
        twin = axes.twinx()
        twin.set_ylabel(right_label)
        for name, values in right.items():
            handles += twin.plot(x, values, marker="s", linestyle=":", color="C3", label=name)
            labels.append(name)
        twin.set_ylim(bottom=0)
    axes.legend(handles, labels, fontsize=8)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    plt.close(figure)
