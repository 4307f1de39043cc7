"""What does HTTP cost? The same requests through the server and in the caller's process.

32 requests (prompts of 32-512 tokens, outputs of 16-128), all at once, streamed by 32 clients from
`tierkv serve`, against `LLM.generate` with the same options, without the prefix cache, in turn. CPU
seconds are those of the process that answers, of the engine's, and of the clients, who share the
cores with them. Then one request at a time: seconds to the first event with text, against seconds
to the first output of `LLM.stream`.

    python benchmarks/http_overhead.py [--quick] [--repeats 5] [--model llama-150m] [--singles 40]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from typing import Any

import httpx
import psutil
from common import workloads
from common.runs import alternate, parse, parser, print_table, write
from common.serving import Answer, Server, Usage, servable_dir, serving, stream
from common.workloads import Request, mixed

from tierkv import LLM, SamplingParams

TARGET_RATIO, TARGET_FIRST_S = 0.93, 0.005
SINGLE_PROMPT, SINGLE_OUTPUT = 64, 2
IN_PROCESS, HTTP = "in process", "HTTP"
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "kv_cache_memory": "1GiB",
    "enable_prefix_caching": False,
    "max_num_seqs": 32,
}


def flags() -> list[str]:
    """OPTIONS as the server's command line has them."""
    words = []
    for name, value in OPTIONS.items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return words


def body_of(request: Request) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "max_tokens": request.num_new,
        "temperature": 0,
        "ignore_eos": True,
    }


def params_of(request: Request) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=request.num_new, ignore_eos=True)


async def ask(client: httpx.AsyncClient, server: Server, request: Request) -> Answer:
    answer = Answer(time.perf_counter())
    async for _ in stream(client, server.url, body_of(request), answer):
        pass
    if answer.usage["completion_tokens"] != request.num_new:
        raise RuntimeError(f"{answer.usage} tokens, asked for {request.num_new}")
    return answer


async def ask_all(server: Server, requests: list[Request]) -> list[Answer]:
    """Every request from a client of its own, at once; those who connect are connected before."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        return await asyncio.gather(*(ask(client, server, request) for request in requests))


def through_http(server: Server, requests: list[Request]) -> dict[str, Any]:
    own = psutil.Process()
    before = {**server.usage(), "clients": Usage.of(own)}
    start = time.perf_counter()
    answers = asyncio.run(ask_all(server, requests))
    seconds = time.perf_counter() - start
    after = {**server.usage(), "clients": Usage.of(own)}
    used = {f"cpu_s_{name}": round(after[name].cpu_s - before[name].cpu_s, 2) for name in after}
    return {"_seconds": seconds, "events": sum(answer.chunks for answer in answers), **used}


def in_process(llm: LLM, requests: list[Request]) -> dict[str, Any]:
    start_cpu = time.process_time()
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    outputs = llm.generate(prompts, [params_of(r) for r in requests], use_tqdm=False)
    for request, output in zip(requests, outputs, strict=True):
        if len(output.outputs[0].token_ids) != request.num_new:
            raise RuntimeError(f"asked for {request.num_new} tokens, got another number")
    return {"cpu_s_engine": round(time.process_time() - start_cpu, 2)}


def first_in_process(llm: LLM, request: Request) -> float:
    """Seconds to the first token."""
    start = time.perf_counter()
    outputs = llm.stream({"prompt_token_ids": request.prompt}, params_of(request))
    next(outputs)
    seconds = time.perf_counter() - start
    for _ in outputs:
        pass
    return seconds


async def first_through_http(server: Server, requests: list[Request], llm: LLM) -> dict[str, Any]:
    """Milliseconds to the first token of single requests, both ways in turn."""
    found: dict[str, list[float]] = {IN_PROCESS: [], HTTP: []}
    async with httpx.AsyncClient(timeout=600) as client:
        for number, request in enumerate(requests):
            answer = await ask(client, server, request)
            assert answer.first is not None
            seconds = first_in_process(llm, request)
            if number >= len(requests) // 10:  # the first ones warm up
                found[HTTP].append(answer.first - answer.begun)
                found[IN_PROCESS].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {
        **{name: round(seconds * 1e3, 2) for name, seconds in medians.items()},
        "overhead_ms": round((medians[HTTP] - medians[IN_PROCESS]) * 1e3, 2),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = str(servable_dir(args.model))
    requests = mixed(9, (8, 40), (2, 8)) if args.quick else mixed()
    rng = random.Random(5)
    singles = [
        Request(workloads.prompt(rng, SINGLE_PROMPT), SINGLE_OUTPUT) for _ in range(args.singles)
    ]
    with serving(model, "--no-offload", *flags()) as server, LLM(model, **OPTIONS) as llm:
        systems = {
            IN_PROCESS: lambda: in_process(llm, requests),
            HTTP: lambda: through_http(server, requests),
        }
        samples = alternate(systems, args.repeats, quiet_s=args.quiet_s)
        first = asyncio.run(first_through_http(server, singles, llm))
    num_tokens = sum(request.num_new for request in requests)
    return {
        "model": args.model,
        "requests": len(requests),
        "generated_tokens": num_tokens,
        "target_ratio": TARGET_RATIO,
        "target_first_ms": TARGET_FIRST_S * 1e3,
        "systems": {
            name: {**one.as_dict(), "tokens_per_s": round(num_tokens / one.median_s, 1)}
            for name, one in samples.items()
        },
        "ratio": round(samples[IN_PROCESS].median_s / samples[HTTP].median_s, 3),
        "first_ms": first,
    }


def show(result: dict[str, Any]) -> None:
    rows: list[list[object]] = [
        [name, figures["tokens_per_s"], *(figures.get(f"cpu_s_{part}", "") for part in _PARTS)]
        for name, figures in result["systems"].items()
    ]
    print_table([f"{result['requests']} at once", "tokens/s", *_PARTS.values()], rows)
    print(f"HTTP: {result['ratio']:.3f} of the rate in process, at least {TARGET_RATIO}")
    first = result["first_ms"]
    print(f"first token: {first[IN_PROCESS]} ms in process, {first['overhead_ms']} ms more by HTTP")


_PARTS = {"engine": "CPU s engine", "server": "CPU s server", "clients": "CPU s clients"}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=5)
    options.add_argument("--model", default="llama-150m", help="shape")
    options.add_argument("--singles", type=int, default=40, help="requests one at a time")
    args = parse(options, argv)
    if args.quick:
        args.model, args.singles = "tiny", 3
    result = measure(args)
    show(result)
    return write(args.out, "http_overhead", result)


if __name__ == "__main__":
    main()
