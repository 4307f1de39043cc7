"""What a seed stands for: an engine, and a history of what happens to it.

Pools are too small for the work, prefixes are shared, conversations come back, and every now and
then somebody aborts, sleeps, pins, forgets, exports, or pulls the plug.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from tierkv.sim.chaos.contents import VOCAB, StepTime
from tierkv.sim.chaos.faults import Weather
from tierkv.sim.mover import CPU, GPU, NVME
from tierkv.types import TierName

SLOT_BYTES = 1 << 20
TENANTS = ("", "a", "b")
NUM_FAMILIES = 3

PREFIXES = [[(7 * i + j * (i + 1)) % VOCAB for j in range(60)] for i in range(NUM_FAMILIES)]
"""Prompts of one family begin alike."""

_CALM = Weather()
_WEATHERS = (
    _CALM,
    Weather(failures=0.05, delays=0.05, delay_s=0.2, erase_failures=0.1),
    Weather(failures=0.3, delays=0.2, delay_s=0.5, erase_failures=0.5),
    Weather(delays=0.3, delay_s=3.0),
    Weather(failures=0.02, is_read_closed=True),
    Weather(failures=0.02, is_write_closed=True),
    Weather(failures=1.0, erase_failures=1.0),
)


@dataclass(slots=True, frozen=True)
class Op:
    """Something that happens: its name, and what it needs to know."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.values.items() if v)])


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
    cpu, nvme = rng.choice(
        [(0, 0), (0, 40), (12, 0), (60, 0), (6, 30), (12, 200), (40, 40), (200, 200), (3, 5)]
    )
    blocks = {GPU: rng.choice([16, 24, 40, 60])}
    blocks |= {tier: count for tier, count in ((CPU, cpu), (NVME, nvme)) if count}
    block_size = rng.choice([2, 4, 8])
    return Scenario(
        blocks=blocks,
        options=_options(rng, block_size, blocks),
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
        weather=rng.choice([_CALM, _CALM, *_WEATHERS]),
        ops=_history(rng, num_ops),
    )


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
    names = ["lru", "fifo", "lfu", "sieve", "s3fifo", "arc", "tinylfu", "gdsf"]
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


# ---------------------------------------------------------------------- histories


def _history(rng: Random, num_ops: int) -> list[Op]:
    ops: list[Op] = []
    kinds = [*_KINDS]
    weights = [weight for weight, _ in _KINDS.values()]
    while len(ops) < num_ops:
        kind = rng.choices(kinds, weights)[0]
        ops += _KINDS[kind][1](rng)
    return ops


def _ask(rng: Random, **given: Any) -> Op:
    """A request whose prompt begins as its family's do."""
    return Op("ask", {"family": rng.randrange(NUM_FAMILIES), **_request(rng), **given})


def _request(rng: Random) -> dict[str, Any]:
    return {
        "length": rng.choice([0, 10, 23, 40, 60]),
        "suffix": [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))],
        "max_tokens": rng.randint(1, 12),
        "n": rng.choice([1, 1, 1, 1, 2, 4]),
        "priority": rng.randrange(3),
        "tenant": rng.choice(TENANTS),
        "stop": rng.choice([None, None, None, rng.randrange(VOCAB)]),
        "hints": _hints(rng),
    }


def _hints(rng: Random) -> dict[str, Any]:
    if rng.random() < 0.6:
        return {}
    return {
        "ttl": rng.choice([None, 0.0, 0.05, 1.0]),
        "priority": rng.choice([0, 0, -5, 5]),
        "no_store": rng.random() < 0.15,
        "session_id": rng.choice(["", "s0", "s1", "s2"]),
        "turn": rng.choice(["", "end", "tool_call"]),
    }


def _storm(rng: Random) -> list[Op]:
    """Many at once with one prefix."""
    family, tenant, length = rng.randrange(NUM_FAMILIES), rng.choice(TENANTS), 40
    count = rng.randint(3, 8)
    return [_ask(rng, family=family, tenant=tenant, length=length) for _ in range(count)]


def _prefix(rng: Random) -> dict[str, Any]:
    """Whose prefix or session something is about."""
    return {
        "tenant": rng.choice(TENANTS),
        "family": rng.randrange(NUM_FAMILIES),
        "length": rng.choice([10, 23, 40, 60]),
        "session": rng.choice([None, None, "s0", "s1"]),
    }


def _keep(rng: Random) -> list[Op]:
    name = rng.choice(["pin", "pin", "unpin", "ttl"])
    return [Op(name, {**_prefix(rng), "ttl": rng.choice([None, 0.0, 0.05, 2.0])})]


def _nap(rng: Random) -> list[Op]:
    """Sleep, mostly until woken, with something happening meanwhile."""
    meanwhile = [_ask(rng)] if rng.random() < 0.5 else []
    steps = Op("step", {"count": rng.choice([0, 3, 30])})
    return [Op("sleep"), *meanwhile, steps, Op("wake")]


def _export(rng: Random) -> list[Op]:
    between = [Op("reset")] if rng.random() < 0.5 else [Op("step", {"count": rng.randint(0, 5)})]
    return [Op("export", _prefix(rng)), *between, Op("import")]


_KINDS: dict[str, tuple[float, Any]] = {
    "ask": (30, lambda rng: [_ask(rng)]),
    "chat": (12, lambda rng: [Op("chat", {"which": rng.randrange(8), **_request(rng)})]),
    "storm": (3, _storm),
    "step": (40, lambda rng: [Op("step", {"count": rng.randint(1, 8)})]),
    "run": (3, lambda rng: [Op("step", {"count": 60})]),
    "abort": (5, lambda rng: [Op("abort", {"which": rng.randrange(8)})]),
    "stop": (2, lambda rng: [Op("stop", {"which": rng.randrange(8)})]),
    "pass": (3, lambda rng: [Op("pass", {"seconds": rng.choice([0.01, 0.5, 5.0])})]),
    "weather": (4, lambda rng: [Op("weather", {"weather": rng.choice(_WEATHERS)})]),
    "reset": (1, lambda rng: [Op("reset")]),
    "keep": (4, _keep),
    "nap": (1, _nap),
    "export": (1, _export),
    "restart": (2, lambda rng: [Op("restart", {"is_clean": rng.random() < 0.4})]),
}
