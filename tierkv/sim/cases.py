"""Which cases a study has: the cross product of what was asked for, and named baselines."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tierkv.errors import ConfigError
from tierkv.sim.hardware import Hardware
from tierkv.sim.machine import Machine
from tierkv.sim.replay import Load
from tierkv.sim.steps import ModelShape
from tierkv.sim.study import Case
from tierkv.types import TierName

BASELINES: dict[str, dict[str, Any]] = {
    "vllm": {
        "eviction_policy": "lru",
        "admission_policy": "prompt-only",
        "preemption_mode": "recompute",
        "prefetch_policy": "none",
        "load_policy": "load",
    },
}
"""Options that make the engine decide as another one does. `vllm`: LRU in the pool, blocks of
prompts written through to an LRU CPU tier, no NVMe tier, hits below always loaded and never before
their turn, preemption by recomputing."""

_LOWEST = {"vllm": TierName.CPU}
"""The coldest tier that a baseline has."""


@dataclass(slots=True, frozen=True)
class Choices:
    """What is varied; every field a list of alternatives.

    Attributes:
        tiers: text of the option and blocks of each tier.
        options: by name of the engine's option.
        rates: times the trace's speed.
        baselines: names in `BASELINES`, each for every choice of tiers and rate.
    """

    tiers: Sequence[tuple[str, Mapping[TierName, int]]]
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    rates: Sequence[float] = (1.0,)
    baselines: Sequence[str] = ()


def make_cases(
    shape: ModelShape,
    hardware: Hardware,
    block_size: int,
    choices: Choices,
    fixed: Mapping[str, Any],
    load: Load,
) -> list[Case]:
    """All cases; labels name only what differs between them.

    Args:
        shape, hardware, block_size: the same for all.
        choices: what is varied.
        fixed: engine options that are not.
        load: how the trace is played, but for its rate.

    Raises:
        ConfigError: a baseline that does not exist.
    """
    cases = []
    for (text, blocks), rate in itertools.product(choices.tiers, choices.rates):
        outer = _labels({"tiers": (text, choices.tiers), "rate": (f"{rate:g}", choices.rates)})
        timed = dataclasses.replace(load, rate=rate)
        for name in choices.baselines:
            machine = Machine(
                shape, hardware, block_size, _above(blocks, name), {**fixed, **_baseline(name)}
            )
            cases.append(Case({"baseline": name, **outer}, machine, timed))
        for values in itertools.product(*choices.options.values()):
            chosen = dict(zip(choices.options, values, strict=True))
            labels = _labels({n: (str(v), choices.options[n]) for n, v in chosen.items()})
            machine = Machine(shape, hardware, block_size, blocks, {**fixed, **chosen})
            cases.append(Case({**labels, **outer}, machine, timed))
    return cases


def _labels(values: Mapping[str, tuple[str, Sequence[Any]]]) -> dict[str, str]:
    return {name: text for name, (text, all_of_it) in values.items() if len(all_of_it) > 1}


def _baseline(name: str) -> dict[str, Any]:
    if name not in BASELINES:
        raise ConfigError("baseline", name, f"choose one of {', '.join(BASELINES)}")
    return BASELINES[name]


def _above(blocks: Mapping[TierName, int], baseline: str) -> dict[TierName, int]:
    order = list(TierName)
    lowest = order.index(_LOWEST[baseline]) if baseline in _LOWEST else len(order)
    return {tier: count for tier, count in blocks.items() if order.index(tier) <= lowest}
