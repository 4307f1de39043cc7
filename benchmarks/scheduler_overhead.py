"""How long do decisions take? plan + commit with many running sequences, and a long prefix match.

No model runs: an executor that returns nothing at once stands in for it, so that the figures are
the scheduler's and the cache's alone.

    python benchmarks/scheduler_overhead.py [--sequences 256] [--context 4096] [--steps 200]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineInfo, EngineRequest, MonotonicClock
from tierkv.engine.plan import Plan
from tierkv.engine.sampling_params import SamplingParams
from tierkv.types import GivenResults, RowResult, SampledToken

VOCAB = 32_000


class InstantExecutor:
    """Executor and sampler in one that answers token 1 at once."""

    def run(self, plan: Plan) -> None:
        return None

    def draw(self, logits: None, plan: Plan) -> GivenResults:
        return GivenResults([RowResult([SampledToken(1)] * row.num_samples) for row in plan.rows])

    def forget(self, seq_id: int) -> None:
        pass


def make_engine(
    num_blocks: int, max_model_len: int, device: Any = None, **options: Any
) -> EngineCore:
    """An engine core of block size 16 without a model; `device` is its executor and sampler."""
    config = EngineConfig.from_mapping({"max_num_batched_tokens": 8192, **options})
    info = EngineInfo(
        model="none",
        tokenizer="",
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        eos_token_ids=[],
        num_gpu_blocks=num_blocks,
        block_size=16,
        dtype="float32",
        device="cpu",
    )
    device = device or InstantExecutor()
    return EngineCore(config, info, device, device, MonotonicClock())


def prompt(length: int, seed: int) -> list[int]:
    """A prompt whose blocks differ between seeds."""
    return [(seed * 7919 + i * 31) % VOCAB for i in range(length)]


def measure_steps(sequences: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds of plan, commit and their sum with every sequence decoding."""
    blocks = sequences * (context + steps + 64) // 16 + sequences
    core = make_engine(blocks, context + steps + 64)
    params = SamplingParams(max_tokens=steps + 32, ignore_eos=True)
    for i in range(sequences):
        core.add_request(EngineRequest(str(i), prompt(context, i), params))
    while any(seq.num_to_compute > 1 for seq in core.scheduler.running.values()) or (
        core.scheduler.waiting
    ):
        core.step()
    plans, commits = [], []
    sampler = InstantExecutor()
    for _ in range(steps):
        start = time.perf_counter()
        plan = core.scheduler.plan()
        planned = time.perf_counter()
        results = sampler.draw(None, plan).results()
        sampled = time.perf_counter()
        core.scheduler.commit(plan, results)
        plans.append((planned - start) * 1e3)
        commits.append((time.perf_counter() - sampled) * 1e3)
    both = [a + b for a, b in zip(plans, commits, strict=True)]
    return {
        "plan_ms": statistics.median(plans),
        "commit_ms": statistics.median(commits),
        "plan_and_commit_ms": statistics.median(both),
        "plan_and_commit_p99_ms": sorted(both)[int(len(both) * 0.99)],
    }


def measure_match(length: int, repeats: int) -> float:
    """Milliseconds to match a cached prompt of `length` tokens, its keys hashed anew."""
    core = make_engine(length // 16 + 64, length + 64)
    tokens = prompt(length, 1)
    core.add_request(EngineRequest("warm", tokens, SamplingParams(max_tokens=1)))
    while core.has_work:
        core.step()
    times = []
    for i in range(repeats):
        core.add_request(EngineRequest(f"m{i}", list(tokens), SamplingParams(max_tokens=1)))
        seq = next(iter(core.scheduler.waiting))
        start = time.perf_counter()
        match = core.cache.lookup(seq)
        times.append((time.perf_counter() - start) * 1e3)
        if match.num_tokens != length - 1:
            raise SystemExit(f"matched {match.num_tokens} of {length} tokens")
        core.abort([f"m{i}"])
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--match-tokens", type=int, default=131_072)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    result: dict[str, object] = {
        "command": "python benchmarks/scheduler_overhead.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "sequences": args.sequences,
        "context": args.context,
        **measure_steps(args.sequences, args.context, args.steps),
        "match_tokens": args.match_tokens,
        "match_ms": measure_match(args.match_tokens, 15),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
