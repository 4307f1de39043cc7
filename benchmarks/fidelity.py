"""Does the simulator predict this machine? The same requests live and in virtual time.

A slice of a trace, with lengths divided by `--shrink` so that a model of 150M parameters on a CPU
keeps up, goes through the live engine (pool and CPU tier) as it arrives, and through the simulator
with the figures that `tierkv calibrate` has just measured here. Equal ids of blocks become equal
tokens. Answers do not come back in later prompts: the live model says what it likes.

    python benchmarks/fidelity.py --trace mooncake.jsonl.gz [--minutes 10] [--rate 0.25]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.models import model_dir, slot_bytes
from common.runs import parse, parser, print_table, write

from tierkv.cli.main import main as tierkv_command
from tierkv.cli.model_facts import read_facts
from tierkv.cli.sim_options import shape_of
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.kv_hints import KvHints
from tierkv.engine.sampling_params import SamplingParams
from tierkv.sim.hardware import load_hardware
from tierkv.sim.machine import Machine
from tierkv.sim.quantiles import Quantiles
from tierkv.sim.replay import Load, replay
from tierkv.sim.source import Source
from tierkv.sim.trace import Trace, TraceRequest
from tierkv.types import TierName

MODEL = "llama-150m"
TARGET_HIT_POINTS, TARGET_TTFT = 1.0, 0.15
_VOCABULARY = range(4, 8192)


def options() -> argparse.ArgumentParser:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--trace", default="chat", help="file or workload")
    arguments.add_argument("--minutes", type=float, default=10.0, help="of the live run")
    arguments.add_argument("--rate", type=float, default=0.25, help="times the trace's speed")
    arguments.add_argument("--shrink", type=int, default=16, help="divides lengths and blocks")
    arguments.add_argument("--coarsen", type=int, help="take larger blocks before that")
    arguments.add_argument("--gpu-blocks", type=int, default=700)
    arguments.add_argument("--cpu-blocks", type=int, default=1500)
    return arguments


def shrunk(trace: Trace, factor: int, until_s: float) -> Trace:
    """The trace's beginning with shorter requests; blocks keep their ids."""

    def begin() -> Iterator[TraceRequest]:
        size = trace.block_size // factor
        for request in trace:
            if request.arrival_s > until_s:
                return
            tokens = max(request.num_blocks * size, request.input_tokens // factor, 1)
            answer = max(1, request.output_tokens // factor)
            yield dataclasses.replace(request, input_tokens=tokens, output_tokens=answer)

    return Trace(trace.name, trace.block_size // factor, begin)


def tokens_of(request: TraceRequest, number: int, size: int) -> list[int]:
    """Token ids: a block's are drawn from its id, those of the rest from the request's number."""
    found: list[int] = []
    for block in request.block_ids()[: request.input_tokens // size]:
        found += random.Random(block).choices(_VOCABULARY, k=size)
    rest = request.input_tokens - len(found)
    return found + random.Random(-number - 1).choices(_VOCABULARY, k=rest)


class Live:
    """The live engine, fed in real time. A session's next request waits for the answer before."""

    def __init__(self, core: EngineCore, trace: Trace, rate: float, most_tokens: int) -> None:
        self.ttft, self.gaps = Quantiles(), Quantiles()
        self._core, self._rate = core, rate
        kept = (r for r in trace if r.input_tokens + r.output_tokens <= most_tokens)
        self._requests = deque(enumerate(kept))
        self._tokens = {n: tokens_of(r, n, trace.block_size) for n, r in self._requests}
        self._due: dict[str, float] = {}
        self._live: dict[str, tuple[TraceRequest, float]] = {}
        self._waiting: dict[str, deque[tuple[int, TraceRequest]]] = {}

    def run(self) -> None:
        core, self._start = self._core, time.monotonic()
        while self._requests or self._live:
            self._take()
            if core.has_work:
                for output in core.step():
                    if output.finish_reason is not None:
                        self._ended(output)
            else:
                core.work_in_background()
                self._sleep()

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _take(self) -> None:
        while self._requests and self._requests[0][1].arrival_s / self._rate <= self._now():
            number, request = self._requests.popleft()
            if request.session and request.session in self._waiting:
                self._waiting[request.session].append((number, request))
            else:
                self._begin(number, request, request.arrival_s / self._rate)

    def _begin(self, number: int, request: TraceRequest, due_s: float) -> None:
        if request.session:
            self._waiting.setdefault(request.session, deque())
        params = SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)
        hints = KvHints(session_id=request.session, turn=request.stop_reason)
        self._core.add_request(
            EngineRequest(str(number), self._tokens.pop(number), params, hints=hints)
        )
        self._live[str(number)] = request, due_s

    def _ended(self, output: Any) -> None:
        request, due_s = self._live.pop(output.request_id)
        first_s = output.metrics.first_token_s
        self.ttft.add(first_s - self._start - due_s)
        if request.output_tokens > 1:
            self.gaps.add((output.metrics.finished_s - first_s) / (request.output_tokens - 1))
        waiting = self._waiting.get(request.session)
        if waiting:
            number, following = waiting.popleft()
            self._begin(number, following, max(self._now(), following.arrival_s / self._rate))
        elif waiting is not None:
            del self._waiting[request.session]

    def _sleep(self) -> None:
        until = self._requests[0][1].arrival_s / self._rate if self._requests else 0.0
        time.sleep(min(0.002, max(0.0, until - self._now())))


def calibrated(model: Path, block_size: int, folder: Path, rounds: int) -> str:
    """The file that `tierkv calibrate` writes."""
    out = folder / "here.yaml"
    flags = ["--rounds", str(rounds), "--no-drive", "--max-model-len", "4096"]
    flags += ["--block-size", str(block_size), "--num-gpu-blocks", str(8192 // block_size)]
    if tierkv_command(["calibrate", str(model), "--out", str(out), *flags]):
        raise RuntimeError("calibrate failed")
    return str(out)


def run_live(model: Path, trace: Trace, args: argparse.Namespace) -> dict[str, Any]:
    config = EngineConfig(
        model=str(model),
        block_size=trace.block_size,
        num_gpu_blocks=args.gpu_blocks,
        offload="cpu",
        cpu_cache_size=args.cpu_blocks * slot_bytes(MODEL, trace.block_size),
        verify_model=False,
    )
    core = EngineCore.from_config(config)
    try:
        live = Live(core, trace, args.rate, args.gpu_blocks * trace.block_size)
        live.run()
        counters = core.metrics()
    finally:
        core.close()
    return {
        "requests": live.ttft.count,
        "hit_rate": counters["hit_tokens"] / counters["queried_tokens"],
        "hit_rate_cpu": counters["hit_tokens_cpu"] / counters["queried_tokens"],
        "ttft_p50_s": live.ttft.quantile(0.5),
        "ttft_p90_s": live.ttft.quantile(0.9),
        "tpot_p50_s": live.gaps.quantile(0.5),
    }


def run_simulated(
    model: Path, trace: Trace, hardware: str, args: argparse.Namespace
) -> dict[str, Any]:
    blocks = {TierName.GPU: args.gpu_blocks, TierName.CPU: args.cpu_blocks}
    machine = Machine(
        shape_of(read_facts(str(model))), load_hardware(hardware), trace.block_size, blocks
    )
    most = args.gpu_blocks * trace.block_size
    found = replay(trace, machine, Load(args.rate, most, reuses_outputs=False))
    return {
        "requests": found.num_requests,
        "hit_rate": found.hit_rate,
        "hit_rate_cpu": found.hit_rate_cpu,
        "ttft_p50_s": found.ttft_s["p50"],
        "ttft_p90_s": found.ttft_s["p90"],
        "tpot_p50_s": found.tpot_s["p50"],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(options(), argv)
    model = model_dir(MODEL)
    minutes = 0.1 if args.quick else args.minutes
    limit = 20 if args.quick else None
    trace = shrunk(
        Source(args.trace, limit=limit, coarsen=args.coarsen).open(),
        args.shrink,
        60 * minutes * args.rate,
    )
    with tempfile.TemporaryDirectory() as folder:
        hardware = calibrated(model, trace.block_size, Path(folder), 1 if args.quick else 3)
        live = run_live(model, trace, args)
        simulated = run_simulated(model, trace, hardware, args)
        table = dataclasses.asdict(load_hardware(hardware))["table"]
    found = {
        "trace": trace.name,
        "rate": args.rate,
        "shrink": args.shrink,
        "live": live,
        "simulated": simulated,
        "table": table,
        "hit_rate_off_points": 100 * (simulated["hit_rate"] - live["hit_rate"]),
        "ttft_p50_off": simulated["ttft_p50_s"] / live["ttft_p50_s"] - 1,
        "target": {"hit_rate_points": TARGET_HIT_POINTS, "ttft_p50": TARGET_TTFT},
    }
    rows = [[name, live[name], simulated[name]] for name in live]
    print_table(["", "live", "simulated"], rows)
    print(f"hit rate off by {found['hit_rate_off_points']:+.2f} points,", end=" ")
    print(f"median TTFT by {100 * found['ttft_p50_off']:+.1f} %")
    return write(args.out, "fidelity", found)


if __name__ == "__main__":
    main()
