"""How fast is the simulator, and does it grow?

Block look-ups per second of CPU time, end to end (scheduler, cache, policies, decode steps), of the
first requests of a trace in one tier and in three; and the memory of 100,000 generated requests,
which must not grow beyond what is live.

    python benchmarks/sim_speed.py --trace agent_A.jsonl.gz [--requests 1500] [--generated 100000]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common.runs import parse, parser, print_table, write

from tierkv.cli.model_facts import read_facts
from tierkv.cli.sim_options import shape_of
from tierkv.sim.generate import generate_trace
from tierkv.sim.hardware import load_hardware
from tierkv.sim.machine import Machine
from tierkv.sim.replay import Load, replay
from tierkv.sim.sizes import Units, auto_gpu_blocks, parse_tiers
from tierkv.sim.source import Source
from tierkv.sim.trace import Trace

TARGET_LOOKUPS_PER_S = 150_000
TIERS = {
    "one tier": "gpu=auto",
    "one tier, large": "gpu=2TB",
    "three tiers": "gpu=auto,cpu=256GiB,nvme=4TB",
}
LIGHT = {"output_tokens": 8, "first_tokens": 300, "result_tokens": 60, "system_tokens": 256}
_PAGE = 4096


def options() -> argparse.ArgumentParser:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--trace", default="coding", help="file or workload")
    arguments.add_argument("--requests", type=int, default=1500)
    arguments.add_argument("--generated", type=int, default=100_000)
    arguments.add_argument("--coarsen", type=int, nargs="*", default=[0, 512])
    return arguments


def machine_for(trace: Trace, tiers: str) -> Machine:
    shape, hardware = shape_of(read_facts("llama-3.1-8b")), load_hardware("h200:drives=4")
    size = trace.block_size
    units = Units(shape.kv_bytes_per_token * size, 1, auto_gpu_blocks(shape, hardware, size))
    return Machine(shape, hardware, size, parse_tiers(tiers, units))


def speed(trace: Trace, tiers: str) -> dict[str, Any]:
    start = time.process_time()
    found = replay(trace, machine_for(trace, tiers))
    seconds = time.process_time() - start
    return {
        "lookups": found.block_lookups,
        "steps": found.counters["steps"],
        "hit_rate": round(found.hit_rate, 4),
        "cpu_s": round(seconds, 2),
        "lookups_per_s": round(found.block_lookups / seconds),
        "tokens_per_s": round(found.counters["queried_tokens"] / seconds),
    }


def growth(count: int) -> dict[str, Any]:
    """Resident megabytes after every tenth of the requests."""
    trace = generate_trace("agents", num_requests=count, session_rate=0.5, **LIGHT)
    sizes: list[int] = []
    start = time.process_time()

    def look(number: int) -> None:
        if number % (count // 10) == 0:
            sizes.append(resident_bytes() // 1_000_000)

    tiers = "gpu=2000blocks,cpu=8000blocks,nvme=40000blocks"
    found = replay(trace, machine_for(trace, tiers), Load(), progress=look)
    return {
        "requests": found.num_requests,
        "cpu_s": round(time.process_time() - start, 1),
        "resident_mb": sizes,
        "hit_rate": round(found.hit_rate, 4),
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(options(), argv)
    if args.quick:
        args.requests, args.generated, args.coarsen = 6, 100, [0]
    grown = growth(args.generated)
    speeds: dict[str, Any] = {}
    for size in args.coarsen:
        trace = Source(args.trace, limit=args.requests, coarsen=size or None).open()
        for name, tiers in TIERS.items():
            speeds[f"{name}, blocks of {trace.block_size}"] = speed(trace, tiers)
    print_table(
        ["", "look-ups", "steps", "hit rate", "CPU s", "look-ups/s", "tokens/s"],
        [[name, *found.values()] for name, found in speeds.items()],
    )
    print(f"{grown['requests']:,} requests: {grown['resident_mb']} MB after each tenth")
    found = {
        "trace": Path(args.trace).name.partition(".")[0],
        "requests": args.requests,
        "speed": speeds,
        "growth": grown,
        "target_lookups_per_s": TARGET_LOOKUPS_PER_S,
    }
    return write(args.out, "sim_speed", found)


if __name__ == "__main__":
    main()
