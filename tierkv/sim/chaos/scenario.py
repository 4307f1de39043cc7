"""What a seed stands for: an engine, and a history of what happens to it.

Any policies, up to three tiers of any size, and a pool that is too small for the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from tierkv.sim.chaos.contents import StepTime
from tierkv.sim.chaos.faults import Weather
from tierkv.sim.chaos.history import CALM, TENANTS, WEATHERS, Author, Op
from tierkv.sim.mover import CPU, GPU, NVME
from tierkv.types import TierName

SLOT_BYTES = 1 << 20
_LOWER = (
    *((0, 0), (0, 40), (0, 200), (12, 0), (60, 0), (200, 0)),
    *((3, 5), (6, 30), (12, 200), (20, 200), (40, 40), (200, 200)),
)
"""Slots of the CPU tier and of the persistent one."""


@dataclass(slots=True)
class Scenario:
    """An engine and its history.

    Attributes:
        blocks: slots of each tier that there is.
        options: of `EngineConfig`.
        limits: of `MoveLimits`.
        window: of attention, if it has one.
        time: of a step.
        block_s: seconds of a block on each link.
        latency_s: of each link.
        quotas: blocks by tenant and tier; tenants have none when it is empty.
        weather: at first.
        ops: what happens, in order.
    """

    blocks: dict[TierName, int]
    options: dict[str, Any]
    limits: dict[str, float]
    window: int | None
    time: StepTime
    block_s: float
    latency_s: float
    quotas: dict[str, dict[str, int]]
    weather: Weather
    ops: list[Op]


def draw(seed: int, num_ops: int = 40) -> Scenario:
    """The scenario of a seed, with about so many operations."""
    rng = Random(seed)
    cpu, nvme = rng.choice(_LOWER)
    block_size = rng.choice([2, 4, 4, 8])
    blocks = {GPU: rng.choice([80, 88, 104, 160]) // block_size}
    blocks |= {tier: count for tier, count in ((CPU, cpu), (NVME, nvme)) if count}
    options = _options(rng, block_size, blocks)
    scenario = Scenario(
        blocks=blocks,
        options=options,
        limits={
            "load_timeout_s": rng.choice([0.02, 0.2, 1.0, 1.0]),
            "step_bytes": rng.choice([4, 1000]) * SLOT_BYTES,
            "link_bytes": rng.choice([4, 1000]) * SLOT_BYTES,
            "room": rng.choice([0.02, 0.3]),
        },
        window=rng.choice([None] * 6 + [5, 16]),
        time=StepTime(rng.choice([1e-3, 1e-2]), rng.choice([1e-5, 1e-3])),
        block_s=rng.choice([5e-5, 1e-3, 2e-2]),
        latency_s=rng.choice([0.0, 1e-4, 5e-3]),
        quotas=_quotas(rng, blocks),
        weather=rng.choice([CALM, CALM, *WEATHERS]),
        ops=Author(rng).history(num_ops),
    )
    options["async_scheduling"] = rng.random() < 0.5  # last: other draws stay what they were
    return scenario


def _options(rng: Random, block_size: int, blocks: dict[TierName, int]) -> dict[str, Any]:
    lower = ",".join(tier.value for tier in blocks if tier is not GPU)
    options: dict[str, Any] = {
        "block_size": block_size,
        "offload": lower or None,
        "enable_prefix_caching": bool(lower) or rng.random() < 0.8,
        "max_num_batched_tokens": rng.choice([8, 16, 64]),
        "max_num_seqs": rng.choice([4, 8, 32]),
        "eviction_policy": rng.choice(_evictions(blocks)),
        "scheduling_policy": rng.choice(["fcfs", "priority", "lpm", "fair"]),
        "preemption_victim": rng.choice(["latest", "priority", "largest", "cheapest"]),
    }
    if not lower:
        return options
    return options | {
        "admission_policy": rng.choice(
            ["write-through", "write-through", "write-back", "second-hit"]
        ),
        "preemption_mode": rng.choice(["recompute", "swap", "swap", "auto"]),
        "load_policy": rng.choice(["load", "load", "recompute", "split", "auto"]),
        "prefetch_policy": rng.choice(["none", "queue", "lookahead"]),
        "oversubscribe": rng.random() < 0.5,
        "time_slice": rng.choice([1, 4]),
        "nvme_write_rate": rng.choice([None, None, 50 * SLOT_BYTES]) if NVME in blocks else None,
    }


def _evictions(blocks: dict[TierName, int]) -> list[str]:
    names = [
        "lru",
        "fifo",
        "lfu",
        "sieve",
        "s3fifo",
        "arc",
        "tinylfu",
        "gdsf",
        "reuse",
        "retention",
    ]
    if len(blocks) == len(TierName):
        names += ["gpu=lru,cpu=s3fifo,nvme=tinylfu", "gpu=sieve,cpu=arc,nvme=gdsf"]
    return names


def _quotas(rng: Random, blocks: dict[TierName, int]) -> dict[str, dict[str, int]]:
    """Of a third of the engines the tenants have quotas, from a block to all of a tier."""
    if rng.random() > 0.35:
        return {}
    return {
        name: {tier.value: rng.randint(1, count) for tier, count in blocks.items()}
        for name in TENANTS[1:]
    }
