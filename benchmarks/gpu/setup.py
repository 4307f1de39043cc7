"""What every section of the suite is given, and how it measures.

A section is a function from a `Setup` to plain numbers. On a GPU it uses the shapes that its
question is about; in a dry run the same code runs on the CPU with shapes that take milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
HEADS_SHAPE = (32, 128)
"""Query heads and elements of each, as an 8B Llama has; 8 KV heads."""
Row = tuple[str, str, str, str]
"""What was measured, the figure, the target, whether it was reached; as in `write_table`."""


@dataclass(slots=True)
class Setup:
    """Where a section runs.

    Attributes:
        device: the GPU, or the CPU in a dry run.
        is_dry: whether shapes are tiny and nothing is concluded.
        folder: for files, empty at first.
        limits: what the section `limits` measured, empty if it has not run.
    """

    device: torch.device
    is_dry: bool
    folder: Path
    limits: dict[str, float]

    def size(self, full: T, tiny: T) -> T:
        """What to use: `full` on a GPU, `tiny` in a dry run."""
        return tiny if self.is_dry else full

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def median_s(self, run: Callable[[], object], repeats: int = 20) -> float:
        """Median seconds of one call, by events on a GPU; after three calls that do not count."""
        repeats = self.size(repeats, 2)
        for _ in range(self.size(3, 1)):
            run()
        self.synchronize()
        if self.device.type != "cuda":
            return statistics.median(wall_s(run) for _ in range(repeats))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for first, last in marks:
            first.record()
            run()
            last.record()
        self.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in marks) / 1000


def wall_s(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def share(value: float, limit: float | None) -> float | None:
    """`value` as a part of `limit`; None without a limit."""
    return round(value / limit, 4) if limit else None


def tried(run: Callable[[], float]) -> float | str:
    """The figure of a peer, or in one line why there is none: a peer that fails is no failure."""
    try:
        return run()
    except Exception as error:
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0][:120] if lines else 'no message'}"


def shown(value: Any, unit: str = "") -> str:
    """A figure, or the reason that there is none."""
    return f"{value:,.2f} {unit}".strip() if isinstance(value, int | float) else str(value)


def target_row(what: str, value: float | None, target: float, *, at_most: bool = False) -> Row:
    """A row whose figure is compared with its target."""
    sign = "<=" if at_most else ">="
    if value is None:
        return what, "not measured", f"{sign} {target:g}", "no"
    is_met = value <= target if at_most else value >= target
    return what, f"{value:.3g}", f"{sign} {target:g}", "yes" if is_met else "no"


def plain_row(what: str, value: Any, unit: str = "") -> Row:
    return what, shown(value, unit), "", ""


Rows = Iterator[Row]
