"""Which configuration to run: the engine's defaults, each single change of them, and the changes
that helped together.

    better   more good requests per second; within `TIE` of each other: less mean TTFT; within it of
             each other: fewer bytes written to NVMe

A search one change at a time and one combination, not all combinations: it says what each mechanism
is worth on this trace, and misses pairs that only help together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cmp_to_key
from typing import Any

from tierkv.sim.machine import Machine
from tierkv.sim.replay import Load
from tierkv.sim.study import Case, Outcome
from tierkv.types import TierName

TIE = 0.01
DEFAULTS = "defaults"
COMBINED = "all that helped"

CHANGES: dict[str, tuple[str, ...]] = {
    "eviction_policy": ("lru", "s3fifo", "arc", "retention", "session-protect", "reuse"),
    "admission_policy": ("second-hit", "write-back"),
    "prefetch_policy": ("none", "queue"),
    "load_policy": ("load", "recompute"),
    "preemption_mode": ("recompute", "swap"),
    "scheduling_policy": ("lpm",),
}
"""Values tried in the place of the engine's default, by option."""

_LOWER_ONLY = ("admission_policy", "prefetch_policy", "load_policy", "preemption_mode")


@dataclass(slots=True, frozen=True)
class Advice:
    """What to run.

    Attributes:
        best, runner_up: the two best of all.
        base: the engine's defaults on all tiers.
        others: all that was tried, the best first.
    """

    best: Outcome
    runner_up: Outcome
    base: Outcome
    others: list[Outcome]


def single_changes(machine: Machine, load: Load, defaults: Mapping[str, Any]) -> list[Case]:
    """The defaults, fewer tiers, and every other value of one option.

    Args:
        machine: all tiers that there are.
        load: how the trace is played.
        defaults: of the options in `CHANGES`.
    """
    cases = [Case({"change": DEFAULTS}, machine, load)]
    lower = [tier for tier in machine.blocks if tier is not TierName.GPU]
    for count in range(len(lower)):
        dropped = lower[count:]
        blocks = {t: n for t, n in machine.blocks.items() if t not in dropped}
        name = "no " + ", no ".join(tier.value for tier in dropped)
        cases.append(Case({"change": name}, replace(machine, blocks=blocks), load))
    for option, values in CHANGES.items():
        if lower or option not in _LOWER_ONLY:
            cases += [
                _changed(machine, load, {option: value})
                for value in values
                if value != defaults[option]
            ]
    return cases


def _changed(machine: Machine, load: Load, options: Mapping[str, Any], name: str = "") -> Case:
    text = name or " ".join(f"{option}={value}" for option, value in options.items())
    return Case({"change": text}, replace(machine, options={**machine.options, **options}), load)


def combination(outcomes: Sequence[Outcome]) -> Case | None:
    """The changes that were each better than the defaults, together; None for fewer than two.

    Of an option the best value counts.
    """
    base = outcomes[0]
    helped: dict[str, tuple[Outcome, Any]] = {}
    blocks = base.case.machine.blocks
    for outcome in outcomes[1:]:
        if compare(outcome, base) >= 0:
            continue
        machine = outcome.case.machine
        if machine.blocks != base.case.machine.blocks:
            blocks = machine.blocks
        for option, value in machine.options.items():
            is_new = base.case.machine.options.get(option) != value
            if is_new and (option not in helped or compare(outcome, helped[option][0]) < 0):
                helped[option] = outcome, value
    if len(helped) + (blocks != base.case.machine.blocks) < 2:
        return None
    machine = replace(base.case.machine, blocks=blocks)
    options = {option: value for option, (_, value) in helped.items()}
    return _changed(machine, base.case.load, options, COMBINED)


def compare(a: Outcome, b: Outcome) -> int:
    """Negative if `a` is better, positive if `b` is."""
    good_a, good_b = a.measures.goodput, b.measures.goodput
    if abs(good_a - good_b) > TIE * max(good_a, good_b):
        return -1 if good_a > good_b else 1
    ttft_a, ttft_b = a.measures.ttft_s["mean"], b.measures.ttft_s["mean"]
    if abs(ttft_a - ttft_b) > TIE * max(ttft_a, ttft_b):
        return -1 if ttft_a < ttft_b else 1
    wear_a, wear_b = a.measures.nvme_written_bytes, b.measures.nvme_written_bytes
    return (wear_a > wear_b) - (wear_a < wear_b)


def advice(outcomes: Sequence[Outcome]) -> Advice:
    """The best of them; the first is the base."""
    ordered = sorted(outcomes, key=cmp_to_key(compare))
    return Advice(ordered[0], ordered[1], outcomes[0], ordered)
