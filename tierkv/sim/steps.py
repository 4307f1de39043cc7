"""What one step of the engine takes: from a model's shape and a device's figures, or measured.

    compute   (2 * parameters * tokens + 4 * layers * heads * head_dim * pairs) / FLOPs
    memory    (weights + KV of all contexts) / bandwidth
    step      max(compute, memory) + overhead + two all-reduces a layer with tensor parallelism

(Williams et al., "Roofline", CACM 2009; pairs = sum over rows of tokens times their mean context.)
So a prompt costs more the longer its context is, and decoding is bound by bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tierkv.sim.hardware import Hardware, StepTable

Row = tuple[int, int]
"""`(start, tokens)`: so many tokens after `start` others."""

_ALL_REDUCE_S = 1.5e-5  # latency of one


@dataclass(slots=True, frozen=True)
class ModelShape:
    """What the cost of a model depends on.

    Attributes:
        name: of the model.
        num_layers, num_heads, head_dim: of its attention.
        num_parameters: all are read and used in every step (for a mixture of experts that is an
            upper bound).
        weight_bytes: of all parameters.
        kv_bytes_per_token: over all layers.
        max_model_len: tokens that its positions allow.
    """

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    max_model_len: int


class StepCost(Protocol):
    """Seconds of a step that computes these rows."""

    def step_s(self, rows: Iterable[Row]) -> float: ...


class Roofline:
    """From figures of data sheets.

    Args:
        shape: the model.
        hardware: where it runs.
    """

    def __init__(self, shape: ModelShape, hardware: Hardware) -> None:
        tp, eff = hardware.tp, hardware.compute_efficiency
        flops = hardware.flops * eff * tp
        bandwidth = hardware.bandwidth * hardware.bandwidth_efficiency * tp
        hidden = shape.num_heads * shape.head_dim
        self._token_s = 2 * shape.num_parameters / flops
        self._pair_s = 4 * shape.num_layers * hidden / flops
        self._weights_s = shape.weight_bytes / bandwidth
        self._context_s = shape.kv_bytes_per_token / bandwidth
        self._fixed_s = hardware.step_overhead_s
        self._reduce_s = 0.0
        if tp > 1:
            self._fixed_s += 2 * shape.num_layers * _ALL_REDUCE_S
            volume = 2 * shape.num_layers * hidden * 2 * 2 * (tp - 1) / tp
            self._reduce_s = volume / hardware.interconnect

    def step_s(self, rows: Iterable[Row]) -> float:
        tokens = contexts = 0
        pairs = 0.0
        for start, count in rows:
            tokens += count
            pairs += count * (start + count / 2)
            contexts += start + count
        compute = self._token_s * tokens + self._pair_s * pairs
        memory = self._weights_s + self._context_s * contexts
        return max(compute, memory) + self._fixed_s + self._reduce_s * tokens


class Measured:
    """From a table.

    Args:
        table: what steps took.
    """

    def __init__(self, table: StepTable) -> None:
        self._table = table

    def step_s(self, rows: Iterable[Row]) -> float:
        table, seconds = self._table, self._table.step_s
        for start, count in rows:
            pairs = count * (start + count / 2)
            seconds += table.row_s + table.token_s * count + table.pair_s * pairs
        return seconds


def step_cost(shape: ModelShape, hardware: Hardware) -> StepCost:
    """The table of the machine, or its roofline."""
    return Measured(hardware.table) if hardware.table is not None else Roofline(shape, hardware)
