"""A study: many cases over one trace, in parallel processes; its results as plain numbers.

Every case sees the same requests: those that the smallest pool could not hold are left out of all.
Results depend on nothing but the trace and the cases, and come in the order of the cases.

    gap closed = (hit rate - LRU's) / (optimum - LRU's)

with LRU's of the case that differs in nothing else. The optimum is MIN (Belady 1966) over requests
that take no time, in one tier that is as large as all tiers of the case together.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from tierkv.errors import ConfigError
from tierkv.sim.instant import Foreseen, optimum
from tierkv.sim.machine import Machine
from tierkv.sim.measures import Measures, Slo
from tierkv.sim.replay import Load, replay
from tierkv.sim.source import Source
from tierkv.sim.trace import Trace, TraceRequest
from tierkv.types import TierName

LRU = "lru"
_TELL_EACH = 16  # requests
_PAUSE_S = 0.2

Progress = Callable[[int], None]
"""Told how many more requests were read."""


@dataclass(slots=True, frozen=True)
class Case:
    """One configuration and load.

    Attributes:
        labels: what distinguishes it, by the name of the option.
        machine, load: what runs, and how fast the trace is played.
    """

    labels: Mapping[str, str]
    machine: Machine
    load: Load

    @property
    def name(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.labels.items()) or "one"

    @property
    def num_blocks(self) -> int:
        """Of all tiers."""
        return sum(self.machine.blocks.values())


@dataclass(slots=True)
class Outcome:
    """A case and what it measured.

    Attributes:
        optimum_hit_rate: of prompt tokens, if it was asked for.
        gap_closed: if there is an LRU to compare with.
    """

    case: Case
    measures: Measures
    optimum_hit_rate: float | None = None
    gap_closed: float | None = None

    def as_dict(self) -> dict[str, Any]:
        machine = self.case.machine
        return {
            "case": dict(self.case.labels),
            "machine": {
                "model": machine.shape.name,
                "hardware": machine.hardware.name,
                "block_size": machine.block_size,
                "blocks": {tier.value: count for tier, count in machine.blocks.items()},
                "options": dict(machine.options),
            },
            "load": dataclasses.asdict(self.case.load),
            "optimum_hit_rate": self.optimum_hit_rate,
            "gap_closed": self.gap_closed,
            **self.measures.as_dict(),
        }


@dataclass(slots=True, frozen=True)
class Study:
    """What is compared.

    Attributes:
        source: of the trace.
        cases: in the order of their results.
        slo: what counts as good.
        with_optimum: also find the offline optimum for each total capacity.
    """

    source: Source
    cases: Sequence[Case]
    slo: Slo = field(default_factory=Slo)
    with_optimum: bool = True


def run_study(study: Study, jobs: int, progress: Progress | None = None) -> list[Outcome]:
    """Run all cases.

    Args:
        study: what.
        jobs: processes; with 1 all is done in this one.
        progress: told how many more requests were read by any of them.

    Raises:
        ConfigError: from a case or the trace.
    """
    cases = same_requests(study.cases)
    tasks: list[Task] = [(_run_case, (study.source, case, study.slo)) for case in cases]
    capacities = sorted({case.num_blocks for case in cases}) if study.with_optimum else []
    most = cases[0].load.max_tokens if cases else None
    if capacities:
        tasks.append((_optima, (study.source, capacities, most)))
    results = run_tasks(tasks, jobs, progress)
    optima = results.pop() if capacities else {}
    outcomes = [Outcome(case, found) for case, found in zip(cases, results, strict=True)]
    _check_not_empty(outcomes)
    for outcome in outcomes:
        outcome.optimum_hit_rate = optima.get(outcome.case.num_blocks)
    _compare(outcomes)
    return outcomes


def same_requests(cases: Iterable[Case]) -> list[Case]:
    """The cases, each without the requests that the smallest pool of them could not hold."""
    found = list(cases)
    limits = [case.machine.max_tokens for case in found]
    limits += [case.load.max_tokens for case in found if case.load.max_tokens is not None]
    most = min(limits, default=None)
    return [
        dataclasses.replace(case, load=dataclasses.replace(case.load, max_tokens=most))
        for case in found
    ]


def _check_not_empty(outcomes: Sequence[Outcome]) -> None:
    """Raise ConfigError if the requests were left out, all of them."""
    if not outcomes or outcomes[0].measures.num_requests:
        return
    num_excluded, most = outcomes[0].measures.num_excluded, outcomes[0].case.load.max_tokens or 0
    smallest = min((outcome.case.machine for outcome in outcomes), key=lambda m: m.max_tokens)
    fix = f"none of the {num_excluded:,} requests fits into {most:,} tokens"
    if smallest.max_tokens == most:
        pool = f"gpu={smallest.blocks[TierName.GPU]}blocks"
        raise ConfigError("tiers", pool, f"{fix}, the smallest pool: give it more")
    fix = f"{fix}, the model's context: take another model, or --no-context-limit"
    raise ConfigError("model", smallest.shape.name, fix)


def _compare(outcomes: Sequence[Outcome]) -> None:
    """Fill in the shares of the gap."""
    lru = {
        _without_policy(o.case): o.measures.hit_rate
        for o in outcomes
        if o.case.machine.options.get("eviction_policy") == LRU
    }
    for outcome in outcomes:
        base, best = lru.get(_without_policy(outcome.case)), outcome.optimum_hit_rate
        if base is not None and best is not None and best > base:
            outcome.gap_closed = (outcome.measures.hit_rate - base) / (best - base)


def _without_policy(case: Case) -> tuple[Any, ...]:
    labels = {n: v for n, v in case.labels.items() if n != "eviction_policy"}
    return tuple(sorted(labels.items()))


# ---------------------------------------------------------------------- in other processes

Task = tuple[Callable[..., Any], tuple[Any, ...]]


def _run_case(source: Source, case: Case, slo: Slo, progress: Progress | None) -> Measures:
    return replay(source.open(), case.machine, case.load, slo, progress)


def _optima(
    source: Source, capacities: Sequence[int], most: int | None, progress: Progress | None
) -> dict[int, float]:
    trace = source.open()
    kept = dataclasses.replace(trace, open=lambda: _fitting(trace, most))
    foreseen = Foreseen.of(kept)
    if progress is not None:
        progress(len(foreseen.requests))
    return {capacity: optimum(foreseen, capacity).rate for capacity in capacities}


def _fitting(trace: Trace, most: int | None) -> Iterator[TraceRequest]:
    return (r for r in trace if most is None or r.input_tokens + r.output_tokens <= most)


def run_tasks(tasks: Sequence[Task], jobs: int, progress: Progress | None = None) -> list[Any]:
    """Call all functions, each with a `progress` of its own after its arguments; their results
    in order. The first error ends all."""
    if jobs <= 1 or len(tasks) <= 1:
        return [call(*arguments, _Counter(progress)) for call, arguments in tasks]
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    with ProcessPoolExecutor(jobs, context, _remember, (news,)) as pool:
        futures = [pool.submit(_call, call, arguments) for call, arguments in tasks]
        try:
            _wait(futures, news, progress)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _wait(futures: Sequence[Future[Any]], news: Any, progress: Progress | None) -> None:
    pending: Iterable[Future[Any]] = futures
    while pending:
        done, pending = wait(pending, timeout=_PAUSE_S)
        for future in done:
            future.result()
        while progress is not None:
            try:
                progress(news.get_nowait())
            except queue.Empty:
                break


_NEWS: list[Any] = []  # of this process, if it is one of a pool


def _remember(news: Any) -> None:
    _NEWS.append(news)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nobody waits for the results of a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return call(*arguments, _Counter(_NEWS[-1].put))


class _Counter:
    """A replay's progress, told in steps."""

    def __init__(self, tell: Progress | None) -> None:
        self._tell = tell
        self._told = 0

    def __call__(self, number: int) -> None:
        if self._tell is not None and number - self._told >= _TELL_EACH:
            self._tell(number - self._told)
            self._told = number
