"""How much of a decode step is the host's, when the device needs some milliseconds for it?

The engine's own scheduler, packing, decode buffers and sampler, with 256 sequences, around a device
that does nothing but take time: forwards queue up behind each other, and what a step drew can be
read once its forward has ended. What a step takes beyond that is what the device stands idle. With
overlapped steps the host works meanwhile.

It says what the host does on this machine, not what a GPU does: copies to it and launches of
kernels are not in it.

    python benchmarks/overlap.py [--quick] [--sequences 256] [--device-ms 2 5 10] [--repeats 5]
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from common.runs import parse, parser, print_table, write
from scheduler_overhead import make_engine, prompt
from torch import Tensor

from tierkv.engine.core import EngineRequest
from tierkv.engine.plan import Plan
from tierkv.engine.sampler import TorchSampler
from tierkv.engine.sampler_unread import UnreadTokens
from tierkv.engine.sampling_params import SamplingParams
from tierkv.model.graphs import DecodeBuffers
from tierkv.model.inputs import BlockTables, late_tokens, pack_rows
from tierkv.types import RowResult

BLOCK_SIZE, VOCAB = 16, 64
CONTEXT = 1000


@dataclass(slots=True)
class Timed:
    """What was drawn, to be read when the device is through."""

    inner: UnreadTokens
    ready_s: float

    def results(self) -> list[RowResult]:
        while (left := self.ready_s - time.perf_counter()) > 0:
            time.sleep(left / 2 if left > 2e-4 else 0)
        return self.inner.results()


class PacedDevice:
    """Executor and sampler: the host's part is real, the device's is time.

    Args:
        num_rows: of the largest step.
        max_model_len: of the longest context.
        device_s: seconds of a forward.
    """

    def __init__(self, num_rows: int, max_model_len: int, device_s: float) -> None:
        cpu = torch.device("cpu")
        self._tables = BlockTables()
        self._buffers = DecodeBuffers(num_rows, max_model_len, BLOCK_SIZE, VOCAB, cpu)
        self._logits = torch.randn(num_rows, VOCAB)
        self._sampler = TorchSampler()
        self._device_s, self._free_s = device_s, 0.0

    def run(self, plan: Plan) -> Tensor:
        inputs = pack_rows(plan.rows, self._tables, BLOCK_SIZE)
        if plan.num_tokens == len(plan.rows):
            source = plan.unread.inner if isinstance(plan.unread, Timed) else None
            late = late_tokens(plan.rows, source) if source is not None else None
            self._buffers.fill(inputs, len(plan.rows), late)
        self._free_s = max(self._free_s, time.perf_counter()) + self._device_s
        return self._logits[: sum(row.num_logit_rows for row in plan.rows)]

    def draw(self, logits: Tensor, plan: Plan) -> Timed:
        return Timed(self._sampler.draw(logits, plan), self._free_s)

    def forget(self, seq_id: int) -> None:
        self._tables.forget(seq_id)
        self._sampler.forget(seq_id)


def measure(num_seqs: int, device_ms: float, steps: int, *, is_overlapped: bool) -> list[float]:
    """Milliseconds of each decode step beyond the device's."""
    length = CONTEXT + steps + 64
    device = PacedDevice(num_seqs, length, device_ms / 1e3)
    num_blocks = num_seqs * (length // BLOCK_SIZE + 2)
    core = make_engine(
        num_blocks, length, device, max_num_seqs=num_seqs, async_scheduling=is_overlapped
    )
    params = SamplingParams(temperature=0.0, max_tokens=steps + 32, ignore_eos=True)
    for i in range(num_seqs):
        tokens = [token % VOCAB for token in prompt(CONTEXT, i)]
        core.add_request(EngineRequest(str(i), tokens, params))
    while core.scheduler.waiting or any(
        seq.num_to_compute > 1 for seq in core.scheduler.running.values()
    ):
        core.step()
    for _ in range(3):
        core.step()
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        core.step()
        found.append((time.perf_counter() - start) * 1e3 - device_ms)
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=5)
    options.add_argument("--sequences", type=int, default=256)
    options.add_argument("--device-ms", type=float, nargs="+", default=[2.0, 5.0, 10.0])
    options.add_argument("--steps", type=int, default=100)
    args = parse(options, argv)
    torch.set_num_threads(1)
    num_seqs, steps = (8, 5) if args.quick else (args.sequences, args.steps)
    idle: dict[str, dict[str, float]] = {}
    for device_ms in args.device_ms:
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.repeats):
            for is_overlapped, times in found.items():
                times += measure(num_seqs, device_ms, steps, is_overlapped=is_overlapped)
        idle[f"{device_ms:g}"] = {
            "in turn": round(statistics.median(found[False]), 3),
            "overlapped": round(statistics.median(found[True]), 3),
        }
    shown: list[list[object]] = [[name, *found.values()] for name, found in idle.items()]
    print_table(["device ms", "idle ms, in turn", "overlapped"], shown)
    result = {"sequences": num_seqs, "context": CONTEXT, "idle_ms": idle}
    return write(args.out, "overlap", result)


if __name__ == "__main__":
    main()
