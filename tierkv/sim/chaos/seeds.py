"""Runs seeds, and makes the history of one that fails as short as it can be."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tierkv.sim.chaos.run import Run
from tierkv.sim.chaos.scenario import Scenario, draw

NUM_OPS = 40


@dataclass(slots=True)
class Outcome:
    """How a seed went.

    Attributes:
        seed, num_ops: what was run.
        failure: the law that was broken, empty when none was.
        digest: hash of everything that happened.
        trace: where the failure was raised.
        lines: what happened, if it was asked for.
        counts: how often what happened.
    """

    seed: int
    num_ops: int
    failure: str = ""
    digest: str = ""
    trace: str = ""
    lines: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def run_seed(
    seed: int,
    num_ops: int = NUM_OPS,
    *,
    keep: Sequence[int] | None = None,
    has_lines: bool = False,
) -> Outcome:
    """Play a seed's scenario.

    Args:
        seed: of everything.
        num_ops: operations of the history, about.
        keep: only these of them, by number; None for all.
        has_lines: whether the outcome tells all that happened.
    """
    scenario = _kept(draw(seed, num_ops), keep)
    outcome = Outcome(seed, len(scenario.ops))
    run = Run(scenario, seed)
    try:
        run.play()
    except Exception as error:  # whatever is raised is what was looked for
        outcome.failure = f"{type(error).__name__}: {error}"
        outcome.trace = traceback.format_exc()
    outcome.digest, outcome.counts = run.log.digest(), run.tally()
    if has_lines:
        outcome.lines = [*run.log.lines()]
    return outcome


def _kept(scenario: Scenario, keep: Sequence[int] | None) -> Scenario:
    if keep is None:
        return scenario
    return replace(scenario, ops=[scenario.ops[number] for number in keep])


def shrink(seed: int, num_ops: int = NUM_OPS) -> list[int]:
    """The numbers of operations that are enough for the seed to fail in the same way.

    Pieces of the history are left out, halves first, then smaller ones, as long as what is left
    still fails with the same kind of error from the same place.
    """
    failing = _place(run_seed(seed, num_ops))
    kept = list(range(len(draw(seed, num_ops).ops)))
    size = len(kept) // 2
    while size:
        start = 0
        while start < len(kept):
            shorter = kept[:start] + kept[start + size :]
            if _place(run_seed(seed, num_ops, keep=shorter)) == failing:
                kept = shorter
            else:
                start += size
        size //= 2
    return kept


def _place(outcome: Outcome) -> str:
    """Kind of error and the line that raised it."""
    lines = [line for line in outcome.trace.splitlines() if line.startswith("  File ")]
    return outcome.failure.partition(":")[0] + (lines[-1] if lines else "")
