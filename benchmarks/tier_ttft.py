"""How long until the first token, when a prompt's prefix is cold, in the pool, below it?

Prompts of 1k to 16k tokens, all but the last 16 tokens of which were computed before. "restart" is
NVMe after the engine was closed and opened again. For each place of the prefix the three answers to
"load it or compute it again?" are compared: always load, always compute, and `auto`, which asks
the cost model.

    python benchmarks/tier_ttft.py [--quick] [--repeats 3] [--model llama-150m]
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.runs import alternate, parse, parser, print_table, write
from common.systems import make_llm
from common.tiers import drop, settle
from common.workloads import prompt, tokens

from tierkv import LLM, SamplingParams
from tierkv.types import TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
LENGTHS = [1024, 2048, 4096, 8192, 16384]
POLICIES = ["load", "recompute", "auto"]
TARGETS = {"cpu": 8.0, "nvme": 5.0}
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
UNIQUE = 16


def first_token(llm: LLM, ids: list[int]) -> dict[str, Any]:
    (output,) = llm.generate([{"prompt_token_ids": ids}], ONE_TOKEN, use_tqdm=False)
    return {"cached_tokens": output.num_cached_tokens}


class Place:
    """Brings the prefix of a prompt into one place before each run."""

    def __init__(self, llm: LLM, prefix: list[int], where: str) -> None:
        self.llm, self.prefix, self.where = llm, prefix, where
        self._random = random.Random(len(prefix))

    def __call__(self) -> dict[str, Any]:
        self._prepare()
        ids = self.prefix + tokens(self._random, UNIQUE)
        seconds, notes = timed(partial(first_token, self.llm, ids))
        return {"_seconds": seconds, **notes}

    def _prepare(self) -> None:
        if self.where == "cold":
            settle(self.llm)
            self.llm.reset_prefix_cache()
            return
        first_token(self.llm, self.prefix)  # computed, or brought back
        settle(self.llm)
        if self.where in ("cpu", "nvme"):
            drop(self.llm, GPU)
        if self.where == "nvme":
            drop(self.llm, CPU)


def timed(run: Callable[[], dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    import time

    start = time.perf_counter()
    notes = run()
    return time.perf_counter() - start, notes


def open_llm(model: str, path: Path, policy: str, longest: int) -> LLM:
    blocks = longest // 16 + 64
    return make_llm(
        model,
        num_gpu_blocks=blocks,
        max_model_len=longest + 64,
        offload="cpu=1GiB,nvme=4GiB",
        nvme_path=str(path / policy),
        load_policy=policy,
        prefetch_policy="none",
    )


def measure(llms: dict[str, LLM], length: int, args: Any) -> dict[str, Any]:
    """Seconds by place and policy for one length."""
    prefix = prompt(random.Random(length), length - UNIQUE)
    systems = {
        f"{where}/{policy}": Place(llm, prefix, where)
        for where in ("cpu", "nvme")
        for policy, llm in llms.items()
    }
    systems |= {where: Place(llms["load"], prefix, where) for where in ("cold", "gpu")}
    samples = alternate(systems, args.repeats, warm=False, quiet_s=args.quiet_s)
    return {name: s.as_dict() for name, s in samples.items()}


def after_restart(model: str, path: Path, lengths: list[int], longest: int) -> dict[int, Any]:
    """One run each: a second one would not be the first after a restart."""
    found = {}
    for length in lengths:
        prefix = prompt(random.Random(length), length - UNIQUE)
        llm = open_llm(model, path, "load", longest)
        first_token(llm, [1, 2, 3])  # allocations of the first step
        seconds, notes = timed(partial(first_token, llm, prefix + [5] * UNIQUE))
        found[length] = {"seconds": round(seconds, 4), **notes}
        llm.close()
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=3)
    options.add_argument("--model", default="llama-150m", help="shape of the model")
    options.add_argument("--longest", type=int, default=max(LENGTHS), help="leave out longer ones")
    args = parse(options, argv)
    model = "tiny" if args.quick else args.model
    lengths = [128, 256] if args.quick else [n for n in LENGTHS if n <= args.longest]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        llms = {p: open_llm(model, path, p, max(lengths)) for p in POLICIES}
        by_length = {str(n): measure(llms, n, args) for n in lengths}
        for n in lengths:  # "cold" made it forget them
            first_token(llms["load"], prompt(random.Random(n), n - UNIQUE))
        for llm in llms.values():
            llm.close()
        restart = after_restart(model, path, lengths, max(lengths))
    for length, entry in by_length.items():
        entry["restart"] = restart[int(length)]
        cold = entry["cold"]["median_s"]
        entry["speedup"] = {
            where: round(cold / entry[f"{where}/load"]["median_s"], 2) for where in ("cpu", "nvme")
        }
        entry["auto_excess_s"] = {
            where: round(
                entry[f"{where}/auto"]["median_s"]
                - min(entry[f"{where}/{p}"]["median_s"] for p in ("load", "recompute")),
                4,
            )
            for where in ("cpu", "nvme")
        }
    show(by_length)
    result = {"model": model, "dtype": "bfloat16", "targets": TARGETS, "lengths": by_length}
    return write(args.out, "tier_ttft", result)


def show(by_length: dict[str, Any]) -> None:
    columns = ["cold", "gpu", "cpu/load", "cpu/auto", "nvme/load", "nvme/auto"]
    rows: list[list[object]] = [
        [f"{length} tokens", *(round(1000 * entry[c]["median_s"], 1) for c in columns),
         round(1000 * entry["restart"]["seconds"], 1)]
        for length, entry in by_length.items()
    ]  # fmt: skip
    print_table(["first token, ms", *columns, "restart"], rows)


if __name__ == "__main__":
    main()
