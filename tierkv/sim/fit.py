"""From measured steps to a `StepTable`: least squares of relative errors, nothing below zero.

    minimise   sum over steps of ((step_s + token_s * tokens + pair_s * pairs + row_s * rows)
                                  / seconds - 1) ** 2     with all four >= 0

Columns whose best value is negative are left out, one after the other (Lawson and Hanson, "Solving
Least Squares Problems", 1974, without their step back: four columns need none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tierkv.errors import ConfigError
from tierkv.sim.hardware import StepTable
from tierkv.sim.steps import Measured, Row

_LEAST = 8


@dataclass(slots=True, frozen=True)
class StepSample:
    """A step as it was measured: its rows `(start, tokens)`, and what it took."""

    rows: tuple[Row, ...]
    seconds: float


def fit_table(samples: Sequence[StepSample]) -> StepTable:
    """The table that describes the steps best.

    Raises:
        ConfigError: too few steps to tell.
    """
    if len(samples) < _LEAST:
        raise ConfigError("samples", len(samples), f"at least {_LEAST} steps must be measured")
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array([_features(sample.rows) for sample in samples]) / seconds[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    kept, values = list(range(4)), np.zeros(4)
    while kept:
        found = np.linalg.lstsq(matrix[:, kept] / scale[kept], np.ones(len(samples)), rcond=None)[0]
        if (found >= 0).all():
            values[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    step_s, token_s, pair_s, row_s = (float(value) for value in values)
    return StepTable(step_s, token_s, pair_s, row_s)


def errors_of(table: StepTable, samples: Sequence[StepSample]) -> list[float]:
    """What the table says of each step, less what it took, relative to that; by size."""
    cost = Measured(table)
    return sorted(abs(cost.step_s(s.rows) / s.seconds - 1) for s in samples)


def _features(rows: Sequence[Row]) -> list[float]:
    tokens = sum(count for _, count in rows)
    pairs = sum(count * (start + count / 2) for start, count in rows)
    return [1.0, float(tokens), float(pairs), float(len(rows))]
