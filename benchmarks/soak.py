"""Does a server stay well? Many streaming clients, some of which leave, over a quarter of the pool.

Clients stream completions one after another for some minutes; every fifth one closes its connection
after a random number of events (or at once). Half of the prompts begin with one of a few shared
prefixes. The pool has a quarter of the blocks that all clients together need, tiers lie below it.

A leak is what is still there when everybody has gone: blocks held, requests known, descriptors. The
memory of the two processes is compared between the first and the last fifth of the time after the
first fifth. Starved is who waits for its first token longer than ten times the median of all.

    python benchmarks/soak.py [--quick] [--minutes 10] [--clients 200] [--model tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import workloads
from common.models import slot_bytes
from common.runs import parse, parser, print_table, write
from common.serving import Answer, Server, Usage, servable_dir, serving, stream

BLOCK_SIZE = 16
PROMPT_TOKENS, OUTPUT_TOKENS = (32, 256), (16, 192)
SHARED_PREFIXES, SHARED_TOKENS = 8, 96
LEAVES = 0.2
STARVED_TIMES = 10
TARGET_GROWTH = 0.02
GONE_S = 60.0
"""After the last client has left, everything must be free within this."""


@dataclass(slots=True)
class Seen:
    """What happened to the requests, and what the processes used meanwhile.

    Attributes:
        answered: streams that ended as they should.
        left: streams that their client closed.
        errors: everything else.
        usages: seconds since the start, and each process's usage.
    """

    answered: list[Answer] = field(default_factory=list)
    left: int = 0
    errors: list[str] = field(default_factory=list)
    usages: list[tuple[float, dict[str, Usage]]] = field(default_factory=list)


class Client:
    """Streams one request after another, and leaves some of them."""

    def __init__(self, server: Server, number: int, prefixes: list[list[int]], seen: Seen) -> None:
        self._url, self._prefixes, self._seen = server.url, prefixes, seen
        self._random = random.Random(number)

    async def run(self, until: float) -> None:
        async with httpx.AsyncClient(timeout=600) as client:
            while time.monotonic() < until:
                try:
                    await self._request(client)
                except (httpx.HTTPError, RuntimeError) as error:
                    self._seen.errors.append(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(1)

    async def _request(self, client: httpx.AsyncClient) -> None:
        body, answer = self._body(), Answer(time.perf_counter())
        leaves_after = None
        if self._random.random() < LEAVES:
            leaves_after = self._random.randrange(body["max_tokens"])
        if leaves_after == 0:
            await self._leave_at_once(client, body)
            return
        events = stream(client, self._url, body, answer)
        async for _ in events:
            if answer.chunks == leaves_after:
                await events.aclose()  # type: ignore[attr-defined]
                self._seen.left += 1
                return
        if answer.usage["completion_tokens"] != body["max_tokens"]:
            raise RuntimeError(f"asked for {body['max_tokens']} tokens, got {answer.usage}")
        self._seen.answered.append(answer)

    async def _leave_at_once(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        task = asyncio.ensure_future(client.post(f"{self._url}/v1/completions", json=body))
        await asyncio.sleep(self._random.random() / 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._seen.left += 1

    def _body(self) -> dict[str, Any]:
        count = self._random.randint(*PROMPT_TOKENS)
        prompt = workloads.prompt(self._random, count)
        if self._random.random() < 0.5:
            prompt = self._random.choice(self._prefixes) + prompt[1:]
        output = self._random.randint(*OUTPUT_TOKENS)
        return {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}


def needed_blocks(clients: int) -> int:
    """What so many requests of average length hold when they end."""
    tokens = sum(PROMPT_TOKENS) / 2 + sum(OUTPUT_TOKENS) / 2 + SHARED_TOKENS / 2
    return round(clients * tokens / BLOCK_SIZE)


async def load(server: Server, args: argparse.Namespace, seen: Seen) -> None:
    """All clients until the time is over, and a look at the processes every now and then."""
    rng = random.Random(1)
    prefixes = [workloads.prompt(rng, SHARED_TOKENS) for _ in range(SHARED_PREFIXES)]
    begun, seconds = time.monotonic(), args.minutes * 60
    clients = [Client(server, number, prefixes, seen) for number in range(args.clients)]
    tasks = [asyncio.create_task(client.run(begun + seconds)) for client in clients]
    while (elapsed := time.monotonic() - begun) < seconds:
        seen.usages.append((elapsed, server.usage()))
        await asyncio.sleep(seconds / 100)
    seen.usages.append((seconds, server.usage()))
    await asyncio.gather(*tasks)


def settle(server: Server, descriptors: int) -> dict[str, float]:
    """What is held after everybody has gone, once nothing changes any more."""
    end = time.monotonic() + GONE_S
    while True:
        metrics, usage = server.metrics(), server.usage()
        held = {name: metrics[f"tierkv_{name}"] for name in ("running", "waiting")}
        held["blocks"] = metrics["tierkv_gpu_blocks_used"]
        now = sum(one.descriptors for one in usage.values())
        held["descriptors"] = max(0, now - descriptors)
        if not any(held.values()) or time.monotonic() > end:
            return held
        time.sleep(0.5)


def growth(seen: Seen) -> dict[str, float]:
    """Share that each process's memory grew by, from the second to the last fifth of the time."""
    fifth = max(1, len(seen.usages) // 5)
    early, late = (
        {name: statistics.median(usage[name].rss_bytes for _, usage in part) for name in part[0][1]}
        for part in (seen.usages[fifth:][:fifth], seen.usages[-fifth:])
    )
    return {name: round(late[name] / early[name] - 1, 4) for name in early}


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    picks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: round(ordered[round(share * last)], 3) for name, share in picks.items()}


def latencies(answers: list[Answer]) -> dict[str, Any]:
    """Seconds to the first token, between tokens, and in all."""
    measures: dict[str, Callable[[Answer, float], float]] = {
        "first_token_s": lambda a, first: first - a.begun,
        "between_tokens_s": lambda a, first: (a.last - first) / max(1, a.chunks - 1),
        "whole_s": lambda a, _: a.last - a.begun,
    }
    timed = [(answer, answer.first) for answer in answers if answer.first is not None]
    return {name: percentiles([of(a, f) for a, f in timed]) for name, of in measures.items()}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pool = needed_blocks(args.clients) // 4
    tier = 2 * pool * slot_bytes(args.model, BLOCK_SIZE)
    flags = ["--num-gpu-blocks", str(pool), "--block-size", str(BLOCK_SIZE)]
    flags += ["--max-model-len", "1024", "--max-num-seqs", str(args.clients)]
    flags += ["--offload", f"cpu={tier},nvme={max(2 * tier, 16 << 20)}:{folder}"]
    seen = Seen()
    with serving(str(servable_dir(args.model)), *flags) as server:
        descriptors = sum(usage.descriptors for usage in server.usage().values())
        asyncio.run(load(server, args, seen))
        held, metrics = settle(server, descriptors), server.metrics()
    latency = latencies(seen.answered)
    limit = STARVED_TIMES * latency["first_token_s"]["p50"]
    counted = ("preemptions", "swaps", "moves_gpu_cpu", "moves_cpu_gpu", "moves_cpu_nvme")
    return {
        "model": args.model,
        "minutes": args.minutes,
        "clients": args.clients,
        "pool_blocks": pool,
        "needed_blocks": needed_blocks(args.clients),
        "answered": len(seen.answered),
        "left_by_their_client": seen.left,
        "errors": seen.errors[:20],
        "num_errors": len(seen.errors),
        "generated_tokens": metrics["tierkv_generated_tokens_total"],
        **{name: metrics[f"tierkv_{name}_total"] for name in counted},
        "held_afterwards": held,
        "memory_growth": growth(seen),
        "target_growth": TARGET_GROWTH,
        "memory_mib": {name: one.rss_bytes >> 20 for name, one in seen.usages[-1][1].items()},
        "latency": latency,
        "starved": sum(a.first - a.begun > limit for a in seen.answered if a.first is not None),
    }


def show(result: dict[str, Any]) -> None:
    rows: list[list[object]] = [[name, *v.values()] for name, v in result["latency"].items()]
    print_table([f"{result['clients']} clients", "p50", "p90", "p99", "max"], rows)
    for name in ("answered", "left_by_their_client", "num_errors", "starved", "preemptions"):
        print(f"{name}: {result[name]:g}")
    print(f"held afterwards: {result['held_afterwards']}")
    print(f"memory growth: {result['memory_growth']}, at most {TARGET_GROWTH}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=1)
    options.add_argument("--model", default="tiny", help="shape")
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--clients", type=int, default=200)
    args = parse(options, argv)
    if args.quick:
        args.minutes, args.clients = 0.1, 24
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    show(result)
    return write(args.out, "soak", result)


if __name__ == "__main__":
    main()
