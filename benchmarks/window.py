"""What does it cost to be watched? One snapshot of a busy engine, and its share of the time.

As in `scheduler_overhead.py` no model runs, so the figure is the snapshot's alone: 256 sequences of
4k tokens decode in a pool of 100,000 blocks while others wait, and between two looks each of them
goes on by some steps, as it does in the quarter of a second that the server leaves between two.

    python benchmarks/window.py [--quick] [--sequences 256] [--context 4096] [--blocks 100000]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import msgpack
from common.runs import parse, parser, print_table, write
from scheduler_overhead import make_engine, prompt

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.observe import Observer
from tierkv.engine.sampling_params import SamplingParams

PER_SECOND = 4
WAITING = 64
TARGET_SHARE = 0.01


def busy_engine(sequences: int, context: int, blocks: int, looks: int, steps: int) -> EngineCore:
    """All sequences decode, as many as WAITING are queued."""
    tokens = looks * steps + 64
    core = make_engine(blocks, context + tokens + 64)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for i in range(sequences + WAITING):
        core.add_request(EngineRequest(str(i), prompt(context, i), params))
    while len(core.scheduler.running) < sequences or any(
        seq.num_to_compute > 1 for seq in core.scheduler.running.values()
    ):
        core.step()
    return core


def measure(core: EngineCore, looks: int, steps: int) -> dict[str, float]:
    """Milliseconds of the first look and of those after it, packed for the other process.

    CPU time is what a look costs; the time on the clock also holds what other processes took.
    """
    observer, wall, cpu, message = Observer(core.scheduler), [], [], b""
    for _ in range(looks):
        for _ in range(steps):
            core.step()
        start, start_cpu = time.perf_counter(), time.thread_time()
        message = msgpack.packb(observer.snapshot())
        cpu.append((time.thread_time() - start_cpu) * 1e3)
        wall.append((time.perf_counter() - start) * 1e3)
    return {
        "first_cpu_ms": cpu[0],
        "snapshot_cpu_ms": statistics.median(cpu[1:]),
        "snapshot_cpu_p99_ms": sorted(cpu[1:])[int(len(cpu[1:]) * 0.99)],
        "snapshot_ms": statistics.median(wall[1:]),
        "share_of_time": statistics.median(cpu[1:]) * PER_SECOND / 1e3,
        "bytes": len(message),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=1)
    options.add_argument("--sequences", type=int, default=256)
    options.add_argument("--context", type=int, default=4096)
    options.add_argument("--blocks", type=int, default=100_000)
    options.add_argument("--looks", type=int, default=100)
    options.add_argument("--steps", type=int, default=12, help="between two looks")
    args = parse(options, argv)
    if args.quick:
        args.sequences, args.context, args.blocks, args.looks = 4, 64, 100, 4
    core = busy_engine(args.sequences, args.context, args.blocks, args.looks, args.steps)
    measured = measure(core, args.looks, args.steps)
    result = {
        "blocks": args.blocks,
        "sequences": args.sequences,
        "context": args.context,
        "target_share": TARGET_SHARE,
        **{name: round(value, 4) for name, value in measured.items()},
    }
    rows: list[list[object]] = [[name, round(value, 3)] for name, value in measured.items()]
    print_table([f"{args.sequences} sequences, {args.blocks} blocks", "figure"], rows)
    return write(args.out, "window", result)


if __name__ == "__main__":
    main()
