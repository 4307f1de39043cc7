"""What lies between the products of a layer: one launch of tierkv's each, beside what torch.compile
makes of the same code and beside that code itself.

Shapes are those of an 8B Llama, for a decode step of one sequence, of 256, and a large chunk. Many
calls are one graph, so that what is measured is the device's time, as in a decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.setup import HEADS_SHAPE, Rows, Setup, tried
from tierkv.kernels import cpu_torch, ops, reference

_CALLS = 20
_TOLERANCE = 5e-3  # of bf16, by norm


def cases(setup: Setup, num_rows: int) -> dict[str, list[Callable[[], Any]]]:
    """By name: tierkv's, and transformers' operations one by one."""
    hidden, inner = setup.size((4096, 14336), (64, 96))
    num_heads, dim = setup.size(HEADS_SHAPE, (4, 16))
    x, joint = setup.randn(num_rows, hidden), setup.randn(num_rows, 2 * inner)
    weight = setup.randn(hidden).float()
    q = setup.randn(num_rows, num_heads, dim).transpose(0, 1)
    k = setup.randn(num_rows, max(1, num_heads // 4), dim).transpose(0, 1)
    cos, sin = setup.randn(num_rows, dim), setup.randn(num_rows, dim)
    return {
        "norm": [
            partial(ops.rms_norm, x, weight, 1e-5, round_first=True),
            partial(cpu_torch.rms_norm, x, weight, 1e-5, True),
        ],
        "gate": [
            partial(ops.act_and_mul, joint, "silu"),
            partial(cpu_torch.act_and_mul, joint, "silu"),
        ],
        "rotate": [partial(ops.rotate, q, k, cos, sin), partial(reference.rotate, q, k, cos, sin)],
    }


def run(setup: Setup) -> dict[str, Any]:
    """Microseconds of each operation three ways, and those that compute something else."""
    found: dict[str, Any] = {"us": {}, "wrong": []}
    for num_rows in setup.size((1, 256, 4096), (1, 5)):
        for name, (own, plain) in cases(setup, num_rows).items():
            label = f"{name}, {num_rows} rows"
            if not agree(own(), plain()):
                found["wrong"].append(label)
            found["us"][label] = {
                "tierkv": device_us(setup, own),
                "compiled": tried(lambda run=plain: device_us(setup, compiled(setup, run))),  # type: ignore[misc]
                "plain": device_us(setup, plain),
            }
    return found


def agree(own: Any, plain: Any) -> bool:
    """The same tensors, but for rounding."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (own, plain)), strict=True)
    return all(_error(found, wanted) <= _TOLERANCE for found, wanted in pairs)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def compiled(setup: Setup, run: partial[Any]) -> Callable[[], Any]:
    """By torch.compile, which a dry run leaves out: it takes a minute on a CPU."""
    if setup.is_dry:
        return run
    function = torch.compile(run.func, dynamic=False)
    return partial(function, *run.args, **run.keywords)


def device_us(setup: Setup, run: Callable[[], Any]) -> float:
    """Microseconds of one of many calls in a graph."""
    if setup.device.type != "cuda":
        return round(1e6 * setup.median_s(run), 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            run()
    return round(1e6 * setup.median_s(graph.replay) / _CALLS, 2)


def rows(found: dict[str, Any]) -> Rows:
    for label, times in found["us"].items():
        figures = ", ".join(f"{time} ({name})" for name, time in times.items())
        yield f"{label}, us", figures, "", ""
    yield (
        "small operations that compute something else",
        "; ".join(found["wrong"]) or "0",
        "<= 0",
        ("no" if found["wrong"] else "yes"),
    )
