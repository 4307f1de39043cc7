"""How many tokens per second over a mixed load, next to transformers' two ways of batching?

32 requests, prompts of 32-512 tokens, outputs of 16-128, greedy, bf16, all present at the start:
padded `generate` batches of 8 in order of arrival, transformers' continuous batching with an empty
cache, and tierkv with an empty cache, in turn. Only tokens that a request asked for count.

    python benchmarks/throughput.py [--quick] [--repeats 3] [--models opt-125m,llama-150m]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common.models import load_hf
from common.runs import alternate, parse, parser, print_table, write
from common.systems import (
    check_lengths,
    make_llm,
    run_continuous,
    run_generate,
    run_tierkv,
    token_ids,
)
from common.workloads import Request, mixed
from transformers import PreTrainedModel

from tierkv import LLM

TARGET_RATIO = 4.0
STATIC, CONTINUOUS, OWN = "generate_batch_8", "continuous_batching", "tierkv"


def with_generate(model: PreTrainedModel, requests: list[Request]) -> dict[str, Any]:
    check_lengths(requests, run_generate(model, requests))
    batches = [requests[i : i + 8] for i in range(0, len(requests), 8)]
    return {"decoded_tokens": sum(max(r.num_new for r in b) * len(b) for b in batches)}


def with_continuous(model: PreTrainedModel, requests: list[Request]) -> dict[str, Any]:
    outputs, seconds = run_continuous(model, requests)
    check_lengths(requests, outputs)
    return {"_seconds": seconds}


def why_not_continuous(model: PreTrainedModel, warm_up: list[Request]) -> str | None:
    """None when it works; some versions cannot run every architecture (OPT in 5.23)."""
    try:
        with_continuous(model, warm_up)
    except RuntimeError as error:
        return f"{type(model).__name__}: {error}"
    return None


def with_tierkv(llm: LLM, requests: list[Request]) -> dict[str, Any]:
    llm.reset_prefix_cache()
    before = llm.metrics()
    check_lengths(requests, token_ids(run_tierkv(llm, requests)))
    after = llm.metrics()
    return {key: after[key] - before[key] for key in ("steps", "preemptions", "hit_tokens")}


def measure(name: str, requests: list[Request], args: argparse.Namespace) -> dict[str, Any]:
    """All three systems on one model."""
    model, llm = load_hf(name), make_llm(name)
    warm_up = [Request(r.prompt[:32], 4) for r in requests[:2]]
    with_generate(model, warm_up)
    refusal = why_not_continuous(model, warm_up)
    with_tierkv(llm, requests)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        STATIC: lambda: with_generate(model, requests),
        CONTINUOUS: lambda: with_continuous(model, requests),
        OWN: lambda: with_tierkv(llm, requests),
    }
    if refusal is not None:
        del runs[CONTINUOUS]
    samples = alternate(runs, args.repeats, warm=False, quiet_s=args.quiet_s)
    llm.close()
    num_tokens = sum(r.num_new for r in requests)
    systems = {
        system: {**s.as_dict(), "tokens_per_s": round(num_tokens / s.median_s, 1)}
        for system, s in samples.items()
    }
    own = samples[OWN].median_s
    return {
        "generated_tokens": num_tokens,
        "systems": systems,
        "ratios": {s: round(samples[s].median_s / own, 2) for s in runs if s != OWN},
        "not_run": {} if refusal is None else {CONTINUOUS: refusal},
    }


def show(models: dict[str, Any]) -> None:
    rows = [
        [f"{model}: {system}", f["median_s"], f["tokens_per_s"], entry["ratios"].get(system, 1.0)]
        for model, entry in models.items()
        for system, f in entry["systems"].items()
    ]
    print_table(["32 mixed requests", "seconds", "tokens/s", "tierkv is faster by"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=3)
    options.add_argument("--models", default="opt-125m,llama-150m", help="comma-separated shapes")
    args = parse(options, argv)
    names = ["tiny"] if args.quick else args.models.split(",")
    requests = mixed(9, (8, 40), (2, 8)) if args.quick else mixed()
    models = {name: measure(name, requests, args) for name in names}
    show(models)
    result = {"dtype": "bfloat16", "target_ratio": TARGET_RATIO, "models": models}
    return write(args.out, "throughput", result)


if __name__ == "__main__":
    main()
