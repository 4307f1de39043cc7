"""Is the well-known "10x over transformers" true? One prompt, equal work, and the unequal ones.

The same random-weight OPT-125m in bf16, the same 21-token prompt, the same number of new tokens
(32 and 256), greedy: transformers' `generate` and tierkv in turn, in one process. Peak memory
comes from a process of its own for each. Then the comparisons that folklore makes, each with the
factor by which its two sides did different work.

    python benchmarks/hf_baseline.py [--quick] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from common.machine import peak_memory_bytes
from common.models import load_hf
from common.runs import Samples, alternate, parse, parser, print_table, write
from common.systems import (
    check_lengths,
    make_llm,
    run_generate,
    run_tierkv,
    token_ids,
)
from common.workloads import Request, prompt
from transformers import PreTrainedModel

from tierkv import LLM

PROMPT_TOKENS = 21
TARGET_RATIO = 1.35


def one(num_new: int, count: int = 1) -> list[Request]:
    """`count` requests of `num_new` tokens each; prompts differ but are equally long."""
    rng = random.Random(1)
    return [Request(prompt(rng, PROMPT_TOKENS), num_new) for _ in range(count)]


def with_tierkv(llm: LLM, requests: list[Request]) -> dict[str, Any]:
    llm.reset_prefix_cache()
    check_lengths(requests, token_ids(run_tierkv(llm, requests)))
    return {}


def with_generate(model: PreTrainedModel, requests: list[Request], batch: int) -> dict[str, Any]:
    check_lengths(requests, run_generate(model, requests, batch))
    return {}


@torch.inference_mode()
def without_cache(model: PreTrainedModel, request: Request) -> dict[str, Any]:
    """`generate` that computes the whole text again for every token."""
    model.generate(
        input_ids=torch.tensor([request.prompt]),
        attention_mask=torch.ones(1, len(request.prompt), dtype=torch.long),
        max_new_tokens=request.num_new,
        min_new_tokens=request.num_new,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
    )
    return {}


def equal_work(
    model: PreTrainedModel, llm: LLM, lengths: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """Latency of both systems at each number of new tokens."""
    result: dict[str, Any] = {}
    for num_new in lengths:
        requests = one(num_new)
        samples = alternate(
            {
                "generate": partial(with_generate, model, requests, 1),
                "tierkv": partial(with_tierkv, llm, requests),
            },
            args.repeats,
            quiet_s=args.quiet_s,
        )
        result[str(num_new)] = _compare(samples, num_new)
    return result


def _compare(samples: dict[str, Samples], num_new: int) -> dict[str, Any]:
    systems = {
        name: {**s.as_dict(), "tokens_per_s": round(num_new / s.median_s, 2)}
        for name, s in samples.items()
    }
    ratio = samples["generate"].median_s / samples["tierkv"].median_s
    return {"systems": systems, "ratio": round(ratio, 3)}


def folklore(
    name: str, model: PreTrainedModel, llm: LLM, lengths: list[int], args: argparse.Namespace
) -> dict[str, float]:
    """Seconds of the sides that well-known comparisons put next to each other."""
    short, eight = one(lengths[0]), one(lengths[0], count=8)
    full = load_hf(name, torch.float32)
    samples = alternate(
        {
            "generate_fp32": partial(with_generate, full, short, 1),
            "generate_no_kv_cache": partial(without_cache, model, short[0]),
            "generate_8_one_by_one": partial(with_generate, model, eight, 1),
            "generate_8_as_a_batch": partial(with_generate, model, eight, 8),
            "tierkv_8_at_once": partial(with_tierkv, llm, eight),
        },
        max(1, args.repeats // 2),
        quiet_s=args.quiet_s,
    )
    seconds = {key: round(s.median_s, 4) for key, s in samples.items()}
    start = time.perf_counter()
    load_hf(name)
    seconds["generate_load"] = round(time.perf_counter() - start, 4)
    return seconds


def unequal(equal: dict[str, Any], sides: dict[str, float]) -> list[dict[str, Any]]:
    """Each folklore comparison: its ratio, and the ratio when both sides do the same."""
    short, long = equal  # the numbers of new tokens, as keys
    hf_short, hf_long, own_short = (
        equal[n]["systems"][system]["median_s"]
        for n, system in ((short, "generate"), (long, "generate"), (short, "tierkv"))
    )
    batch = sides["generate_8_as_a_batch"] / sides["tierkv_8_at_once"]
    rows = [
        (f"{long} tokens there, {short} here", hf_long / own_short, None),
        ("model loading timed there only", (hf_short + sides["generate_load"]) / own_short, None),
        ("fp32 there, bf16 here", sides["generate_fp32"] / own_short, None),
        ("no KV cache there", sides["generate_no_kv_cache"] / own_short, None),
        (
            "8 requests one by one there, together here",
            sides["generate_8_one_by_one"] / sides["tierkv_8_at_once"],
            batch,
        ),
    ]
    return [
        {
            "comparison": text,
            "ratio": round(ratio, 2),
            "equal_work_ratio": round(fair or equal[short]["ratio"], 2),
        }
        for text, ratio, fair in rows
    ]


def peak_memory(system: str, model: str, num_new: int) -> dict[str, float]:
    """Run one system in a process of its own; MiB resident after loading and at the peak."""
    command = [sys.executable, __file__, "--memory-of", system, "--model", model]
    done = subprocess.run(
        [*command, "--new-tokens", str(num_new)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def report_own_memory(system: str, model: str, num_new: int) -> None:
    """The child's part of `peak_memory`."""
    imported = peak_memory_bytes()
    requests = one(num_new)
    if system == "generate":
        hf = load_hf(model)
        loaded = peak_memory_bytes()
        with_generate(hf, requests, 1)
    else:
        llm = make_llm(model)
        loaded = peak_memory_bytes()
        with_tierkv(llm, requests)
    peaks = {"imports": imported, "loaded": loaded, "peak": peak_memory_bytes()}
    print(json.dumps({f"{key}_mib": round(value / 2**20, 1) for key, value in peaks.items()}))


def show(result: dict[str, Any]) -> None:
    rows = [
        [f"{system}, {n} tokens", figures["median_s"], figures["tokens_per_s"]]
        for n, entry in result["equal_work"].items()
        for system, figures in entry["systems"].items()
    ]
    print_table(["equal work, batch 1, bf16", "latency s", "tokens/s"], rows)
    for n, entry in result["equal_work"].items():
        print(f"tierkv is {entry['ratio']:.2f}x faster than generate at {n} tokens")
    print()
    memory = [[name, *figures.values()] for name, figures in result["memory"].items()]
    print_table(["peak memory, MiB", "imports", "loaded", "peak"], memory)
    print()
    folk = [[r["comparison"], r["ratio"], r["equal_work_ratio"]] for r in result["folklore"]]
    print_table(["folklore comparison", "its ratio", "equal work"], folk)
    print("What goes beyond the last column is not the engine: the two sides did different work.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=5)
    options.add_argument("--memory-of", choices=("generate", "tierkv"), help=argparse.SUPPRESS)
    options.add_argument("--model", help="default: opt-125m")
    options.add_argument("--new-tokens", type=int, default=32, help=argparse.SUPPRESS)
    args = parse(options, argv)
    name = args.model or ("tiny" if args.quick else "opt-125m")
    if args.memory_of:
        report_own_memory(args.memory_of, name, args.new_tokens)
        return {}
    lengths = [4, 8] if args.quick else [32, 256]
    model, llm = load_hf(name), make_llm(name)
    equal = equal_work(model, llm, lengths, args)
    sides = folklore(name, model, llm, lengths, args)
    llm.close()
    result = {
        "model": name,
        "dtype": "bfloat16",
        "prompt_tokens": PROMPT_TOKENS,
        "target_ratio": TARGET_RATIO,
        "equal_work": equal,
        "memory": {s: peak_memory(s, name, lengths[-1]) for s in ("generate", "tierkv")},
        "folklore_s": sides,
        "folklore": unequal(equal, sides),
    }
    show(result)
    return write(args.out, "hf_baseline", result)


if __name__ == "__main__":
    main()
