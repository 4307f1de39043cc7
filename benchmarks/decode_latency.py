"""What do moves cost those who are decoding? Time between two tokens, by bytes moved a step.

A batch decodes while blocks that earlier prompts left in the pool go down to the CPU tier, as many
bytes a step as `MoveLimits.step_bytes` allows; with budget 0 there are no tiers. Every running
sequence gets one token a step, so that a step's time is the time between two tokens of each. When
all blocks have gone down they are dropped there, between two steps, and offered again.

The budget is no option of the engine: the program sets `limits.step_bytes` of the cache's lower
tiers, and `limits.link_bytes` (what may be in flight) to twice as much, as by default.

    python benchmarks/decode_latency.py [--quick] [--repeats 5] [--model llama-150m]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from common import plots
from common.models import model_dir, slot_bytes
from common.runs import Samples, alternate, parse, parser, print_table, write
from common.workloads import prompt

from tierkv import SamplingParams
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.policies.admission import When
from tierkv.policies.base import Why
from tierkv.types import TierName

MIB = 1 << 20
BUDGETS = [0, 1, 4, 16, 64, 256]
DEFAULT_BUDGET = 64
GPU, CPU = TierName.GPU, TierName.CPU
BLOCK_SIZE = 16


class Shape:
    """What is measured: the batch, and what lies in the pool beside it.

    Attributes:
        batch: sequences that decode.
        context: tokens of their prompts.
        steps: decode steps of one run.
        pile: blocks that go down meanwhile.
        pile_prompt: blocks of each prompt that left them.
    """

    def __init__(self, batch: int, context: int, steps: int, pile: int, pile_prompt: int) -> None:
        self.batch, self.context, self.steps = batch, context, steps
        self.pile, self.pile_prompt = pile, pile_prompt

    @property
    def num_blocks(self) -> int:
        """Of the pool: room for all of it."""
        return self.pile + self.batch * ((self.context + self.steps) // BLOCK_SIZE + 4)


class Decoding:
    """An engine whose pool is full of blocks that can go down."""

    def __init__(self, model: str, shape: Shape, *, has_tiers: bool) -> None:
        self.shape = shape
        self._random = random.Random(1)
        self._num_requests = 0
        size = 2 * shape.num_blocks * slot_bytes(model)
        config = EngineConfig(
            model=str(model_dir(model)),
            dtype="bfloat16",
            block_size=BLOCK_SIZE,
            num_gpu_blocks=shape.num_blocks,
            offload=f"cpu={size}" if has_tiers else None,
        )
        self.core = EngineCore.from_config(config)
        self._set_budget(0)
        for _ in range(shape.pile // shape.pile_prompt):
            self._add(shape.pile_prompt * BLOCK_SIZE, 1)
        self._finish()
        self.pile = [block for block in self.core.cache.tree if GPU in block.copies]
        self._keys = {block.key for block in self.pile}

    def _set_budget(self, num_bytes: int) -> None:
        lower = self.core.cache.lower
        if lower is not None:
            lower.limits.step_bytes = num_bytes
            lower.limits.link_bytes = 2 * num_bytes

    def _add(self, num_tokens: int, num_new: int) -> None:
        self._num_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        ids = prompt(self._random, num_tokens)
        self.core.add_request(EngineRequest(str(self._num_requests), ids, params))

    def _finish(self) -> None:
        while self.core.has_work:
            self.core.step()

    def run(self, budget: int) -> tuple[list[float], int]:
        """Seconds of each decode step of a new batch, and the bytes that began to move."""
        self._forget_batch()
        for _ in range(self.shape.batch):
            self._add(self.shape.context, self.shape.steps + 1)
        self._set_budget(0)
        while not self._is_decoding():
            self.core.step()
        self._set_budget(budget)
        before, seconds = self._begun_bytes(), []
        while self.core.has_work:
            self._offer_again()
            start = time.perf_counter()
            self.core.step()
            seconds.append(time.perf_counter() - start)
        return seconds, self._begun_bytes() - before

    def _forget_batch(self) -> None:
        """Leave nothing but the pile in the pool, and nothing to be moved."""
        self._set_budget(1 << 40)
        if not self.core.flush(60.0):
            raise RuntimeError("blocks did not go down within a minute")
        cache = self.core.cache
        others = [block for block in cache.tree if block.key not in self._keys]
        for block in sorted(others, key=lambda block: -block.depth):
            for tier in list(block.copies):
                cache.evictors[tier].drop(block, Why.REMOVED)

    def _is_decoding(self) -> bool:
        scheduler = self.core.scheduler
        return not scheduler.waiting and all(
            seq.num_to_compute == 1 for seq in scheduler.running.values()
        )

    def _begun_bytes(self) -> int:
        """Bytes whose way down has begun, since the start."""
        moves = self.core.cache.moves
        if moves is None:
            return 0
        return int(self.core.metrics()["moved_bytes_gpu_cpu"]) + moves.in_flight_bytes[GPU, CPU]

    def _offer_again(self) -> None:
        """When all blocks of the pile have gone down: begin anew."""
        cache = self.core.cache
        if cache.lower is None or cache.has_background_work:
            return
        for block in sorted(self.pile, key=lambda block: -block.depth):
            if CPU in block.copies:
                cache.evictors[CPU].drop(block, Why.REMOVED)
        for block in self.pile:
            cache.lower.offer(block, GPU, When.READY, cache.hint_of(block))


class Curve:
    """All step times by budget, over all runs."""

    def __init__(self, model: str, shape: Shape) -> None:
        self.plain = Decoding(model, shape, has_tiers=False)
        self.tiered = Decoding(model, shape, has_tiers=True)
        self.seconds: dict[int, list[float]] = {budget: [] for budget in BUDGETS}

    def run(self, budget: int) -> dict[str, Any]:
        """One batch at this budget (MiB)."""
        decoding = self.tiered if budget else self.plain
        seconds, moved = decoding.run(budget * MIB)
        self.seconds[budget] += seconds
        return {
            "_seconds": sum(seconds),
            "moved_mib_per_step": moved / MIB / len(seconds),
        }

    def point(self, budget: int, samples: Samples) -> dict[str, Any]:
        ranked = sorted(self.seconds[budget])
        return {
            "p50_ms": round(1000 * ranked[len(ranked) // 2], 3),
            "p99_ms": round(1000 * ranked[int(len(ranked) * 0.99)], 3),
            "steps": len(ranked),
            **samples.as_dict(),
        }


def measure(model: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """The curve: figures by budget in MiB."""
    curve = Curve(model, shape)
    samples = alternate(
        {str(budget): lambda budget=budget: curve.run(budget) for budget in BUDGETS},  # type: ignore[misc]
        args.repeats,
        warm=False,
        quiet_s=args.quiet_s,
    )
    curve.plain.core.close()
    curve.tiered.core.close()
    points = {str(budget): curve.point(budget, samples[str(budget)]) for budget in BUDGETS}
    base = points["0"]
    for point in points.values():
        point["p50_ratio"] = round(point["p50_ms"] / base["p50_ms"], 3)
        point["p99_ratio"] = round(point["p99_ms"] / base["p99_ms"], 3)
    return points


def plot(target: Path, model: str, points: dict[str, Any]) -> None:
    moving = [budget for budget in BUDGETS if budget]
    plots.lines(
        target,
        moving,
        {name: [points[str(b)][f"{name}_ms"] for b in moving] for name in ("p50", "p99")},
        title=f"Decoding while blocks move ({model} shape)",
        left_label="ms between two tokens",
        x_label="MiB that may begin to move in a step",
        floor=(points["0"]["p50_ms"], "p50 with one tier"),
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=5)
    options.add_argument("--model", default="llama-150m", help="shape of the model")
    args = parse(options, argv)
    model = "tiny" if args.quick else args.model
    shape = Shape(2, 32, 8, 16, 4) if args.quick else Shape(8, 256, 96, 1344, 64)
    points = measure(model, shape, args)
    rows: list[list[object]] = [
        [
            f"{budget} MiB" if budget else "one tier",
            points[str(budget)]["moved_mib_per_step"],
            points[str(budget)]["p50_ms"],
            points[str(budget)]["p99_ms"],
            points[str(budget)]["p50_ratio"],
            points[str(budget)]["p99_ratio"],
        ]
        for budget in BUDGETS
    ]
    print_table(["budget of a step", "MiB moved", "p50 ms", "p99 ms", "p50 x", "p99 x"], rows)
    if args.out is not None:
        plot(args.out / "decode_latency.png", model, points)
    result = {
        "model": model,
        "batch": shape.batch,
        "context": shape.context,
        "pile_bytes": shape.pile * slot_bytes(model),
        "default_budget_mib": DEFAULT_BUDGET,
        "budgets": points,
    }
    return write(args.out, "decode_latency", result)


if __name__ == "__main__":
    main()
