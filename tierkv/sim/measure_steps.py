"""What steps of a running engine take, for the simulator: prompts, decodes and both at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.plan import Plan
from tierkv.engine.sampling_params import SamplingParams
from tierkv.protocols import Executor
from tierkv.sim.fit import StepSample
from tierkv.sim.steps import Row

PROMPTS = (16, 64, 192, 512, 1024, 3072)
BATCHES = ((1, 64), (1, 1024), (4, 256), (8, 64), (16, 192))
"""Sequences that decode at once, and tokens of context that each begins with."""
_DECODES = 10  # tokens of each


class _Recorder:
    """An executor that remembers the last plan's rows."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.rows: tuple[Row, ...] = ()

    def run(self, plan: Plan) -> Any:
        self.rows = tuple((row.start, row.num_tokens) for row in plan.rows)
        return self._inner.run(plan)

    def take(self) -> tuple[Row, ...]:
        """Those that ran since the last call."""
        rows, self.rows = self.rows, ()
        return rows

    def forget(self, seq_id: int) -> None:
        self._inner.forget(seq_id)


def measure_steps(
    core: EngineCore, rounds: int = 2, progress: Callable[[int], None] | None = None
) -> list[StepSample]:
    """Run prompts of many lengths and batches of many sizes, and time every step as a whole.

    Args:
        core: of an idle engine without lower tiers; its own executor is back in place at the end.
        rounds: how often each is run, with different tokens; the first one more to warm up.
        progress: told of each workload that has run.

    Returns:
        The steps of all rounds but the first.
    """
    inner, recorder = core.steps.executor, _Recorder(core.steps.executor)
    core.steps.executor = recorder
    samples: list[StepSample] = []
    random_ids = random.Random(0)
    try:
        for number in range(rounds + 1):
            for lengths, max_tokens in workloads(core):
                found = _run(core, recorder, lengths, max_tokens, random_ids)
                samples += found if number else []
                if progress is not None:
                    progress(1)
    finally:
        core.steps.executor = inner
    return samples


def workloads(core: EngineCore) -> list[tuple[list[int], int]]:
    """Lengths of prompts that run together, and tokens that each generates."""
    most = core.info.max_model_len - _DECODES - 1
    room = core.info.num_gpu_blocks
    found = [([length], 1) for length in PROMPTS if length <= most]
    for batch, context in BATCHES:
        blocks = batch * -(-(context + _DECODES) // core.info.block_size)
        if context <= most and blocks < room:
            found.append(([context] * batch, _DECODES))
    return found


def _run(
    core: EngineCore,
    recorder: _Recorder,
    lengths: list[int],
    max_tokens: int,
    random_ids: random.Random,
) -> list[StepSample]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    vocabulary = core.info.vocab_size
    for index, length in enumerate(lengths):
        tokens = [random_ids.randrange(vocabulary) for _ in range(length)]
        core.add_request(EngineRequest(f"calibrate-{index}", tokens, params))
    samples = []
    while core.has_work:
        start = time.perf_counter()
        core.step()
        seconds = time.perf_counter() - start
        if rows := recorder.take():
            samples.append(StepSample(rows, seconds))
    return samples
