"""Which share of the reserved KV holds tokens? Reserving the maximum, and paging.

The real scheduler and cache run a mixed load (no model: a share of positions does not depend on
what is in them) and are sampled after every step: positions that hold the KV of a live sequence,
over positions in the blocks that live sequences hold, shared blocks counted once (blocks that no
live sequence holds are cache: full, and given up when a sequence needs room). Reserve-max is
the same sequences at the same moments with `max_model_len` contiguous positions each;
reserve-final is the same with every output's length known beforehand.

    python benchmarks/memory_waste.py [--quick]
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from common import plots
from common.occupancy import Arrival, Occupancy, engine_without_model, play
from common.runs import parse, parser, print_table, write
from common.workloads import prompt, tokens

from tierkv import SamplingParams

BLOCK_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
MAX_MODEL_LEN = 2048
POOL_TOKENS = 16_384
TARGET_SHARE = 0.92


def mixed_load(count: int, seed: int = 5) -> list[Arrival]:
    """Arrivals about 6 steps apart: chats, longer prompts, shared prefixes, parallel samples.

    Prompt lengths are log-normal with a median of 160 tokens, at most 1,200; outputs log-normal
    with a median of 100, at most 400. A quarter begin with one of two 256-token system prompts;
    one in ten asks for 3 samples.
    """
    rng = random.Random(seed)
    systems = [prompt(rng, 256) for _ in range(2)]
    arrivals, step = [], 0
    for _ in range(count):
        body = tokens(rng, min(1200, max(8, int(rng.lognormvariate(5.08, 0.9)))))
        text = rng.choice(systems) + body if rng.random() < 0.25 else body
        num_new = min(400, max(4, int(rng.lognormvariate(4.6, 0.7))))
        n = 3 if rng.random() < 0.1 else 1
        params = SamplingParams(n=n, max_tokens=num_new, ignore_eos=True)
        arrivals.append(Arrival(step, text, params))
        step += int(rng.expovariate(1 / 6))
    return arrivals


def measure(block_size: int, arrivals: list[Arrival]) -> tuple[Occupancy, dict[str, Any]]:
    core = engine_without_model(POOL_TOKENS, block_size, MAX_MODEL_LEN)
    occupancy = play(core, arrivals)
    metrics = core.metrics()
    return occupancy, {
        "share": round(occupancy.paged_share, 4),
        "mean_sequences": round(occupancy.num_sequences / occupancy.num_steps, 2),
        "steps": occupancy.num_steps,
        "hit_tokens": metrics["hit_tokens"],
        "preemptions": metrics["preemptions"],
    }


def plot(folder: Path, shares: list[float], reserve_max: float, reserve_final: float) -> None:
    """Writes memory_waste.png."""
    percent = {
        "paged": shares,
        f"reserve max_model_len={MAX_MODEL_LEN}": [reserve_max] * len(shares),
        "reserve final length (not knowable)": [reserve_final] * len(shares),
    }
    plots.lines(
        folder / "memory_waste.png",
        BLOCK_SIZES,
        {name: [100 * v for v in values] for name, values in percent.items()},
        title="Reserved KV that holds tokens, mixed load",
        left_label="% of reserved positions",
        floor=(100 * TARGET_SHARE, f"target at 16: {TARGET_SHARE:.0%}"),
    )


def _percent(share: float) -> str:
    return f"{share:.1%}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(parser(__doc__, repeats=1), argv)
    arrivals = mixed_load(6 if args.quick else 100)
    runs = {size: measure(size, arrivals) for size in BLOCK_SIZES}
    at_16 = runs[16][0]
    paged = {str(size): figures for size, (_, figures) in runs.items()}
    result = {
        "max_model_len": MAX_MODEL_LEN,
        "pool_tokens": POOL_TOKENS,
        "requests": len(arrivals),
        "target_share_at_16": TARGET_SHARE,
        "paged": paged,
        "reserve_max_share": round(at_16.reserve_max_share, 4),
        "reserve_final_share": round(at_16.reserve_final_share, 4),
    }
    rows: list[list[object]] = [
        [f"paged, block size {s}", _percent(p["share"])] for s, p in paged.items()
    ]
    rows.append([f"reserve max_model_len={MAX_MODEL_LEN}", _percent(at_16.reserve_max_share)])
    rows.append(["reserve final length (not knowable)", _percent(at_16.reserve_final_share)])
    print_table(["reserved KV that holds tokens", "share"], rows)
    if args.out is not None:
        shares = [p["share"] for p in paged.values()]
        plot(args.out, shares, at_16.reserve_max_share, at_16.reserve_final_share)
    return write(args.out, "memory_waste", result)


if __name__ == "__main__":
    main()
