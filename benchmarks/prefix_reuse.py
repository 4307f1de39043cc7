"""What is prefix reuse worth? The same requests with the prefix cache on and off.

First 16 requests that share a 1,536-token prefix. Then four kinds of work (retrieval with a 2K
system prompt, a coding assistant, open chat, an agent with tools), each as linear sessions, where
every request continues the one before it, and branching, where several continue the same point.
Every run begins with an empty cache, so the first computation of a prefix is always paid.

    python benchmarks/prefix_reuse.py [--quick] [--repeats 3] [--model llama-150m]
"""

from __future__ import annotations

import argparse
from typing import Any

from common.runs import alternate, parse, parser, print_table, write
from common.systems import check_lengths, make_llm, run_sessions, run_tierkv, token_ids
from common.workloads import SESSIONS, SHAPES, Request, Sessions, shared_prefix

from tierkv import LLM

TARGET_SPEEDUP = 6.0


def run_requests(llm: LLM, requests: list[Request]) -> dict[str, Any]:
    llm.reset_prefix_cache()
    outputs = run_tierkv(llm, requests)
    check_lengths(requests, token_ids(outputs))
    return {
        "prompt_tokens": sum(len(r.prompt) for r in requests),
        "cached_tokens": sum(o.num_cached_tokens or 0 for o in outputs),
    }


def run_tree(llm: LLM, sessions: Sessions) -> dict[str, Any]:
    llm.reset_prefix_cache()
    return dict(run_sessions(llm, sessions))


def compare(
    on: LLM, off: LLM, work: list[Request] | Sessions, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds with reuse and without, and the share of prompt tokens that was reused."""

    def run(llm: LLM) -> dict[str, Any]:
        return run_tree(llm, work) if isinstance(work, Sessions) else run_requests(llm, work)

    samples = alternate(
        {"on": lambda: run(on), "off": lambda: run(off)}, args.repeats, quiet_s=args.quiet_s
    )
    notes = samples["on"].notes
    return {
        **{name: s.as_dict() for name, s in samples.items()},
        "reused_share": round(notes["cached_tokens"] / notes["prompt_tokens"], 3),
        "speedup": round(samples["off"].median_s / samples["on"].median_s, 2),
    }


def show(result: dict[str, Any]) -> None:
    entries = {"shared prefix, 16 requests": result["shared_prefix"]}
    for name, by_shape in result["workloads"].items():
        entries |= {f"{name}, {shape}": entry for shape, entry in by_shape.items()}
    rows = [
        [name, e["off"]["median_s"], e["on"]["median_s"], f"{e['reused_share']:.0%}", e["speedup"]]
        for name, e in entries.items()
    ]
    print_table(["prefix reuse", "off s", "on s", "share reused", "faster by"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=3)
    options.add_argument("--model", default="llama-150m", help="shape of the model")
    args = parse(options, argv)
    name, scale = ("tiny", 16) if args.quick else (args.model, 1)
    on = make_llm(name, max_model_len=4096)
    off = make_llm(name, max_model_len=4096, enable_prefix_caching=False)
    requests = shared_prefix(4, 96, 8, 2) if args.quick else shared_prefix()
    shared = compare(on, off, requests, args)
    workloads = {
        kind: {shape: compare(on, off, make(shape, scale), args) for shape in SHAPES}
        for kind, make in SESSIONS.items()
    }
    on.close()
    off.close()
    result = {
        "model": name,
        "dtype": "bfloat16",
        "target_speedup": TARGET_SPEEDUP,
        "shared_prefix": shared,
        "workloads": workloads,
    }
    show(result)
    return write(args.out, "prefix_reuse", result)


if __name__ == "__main__":
    main()
