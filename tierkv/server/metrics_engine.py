"""The engine's numbers for Prometheus, as last known: a scrape waits for the engine only so long.

Each name of `AsyncLLM.metrics()` becomes `tierkv_NAME`, counters with `_total` behind it. Names
that hold a tier, a link, a cause or a reason are there a second time, as families with labels:

    cpu_blocks_free             tierkv_tier_blocks_free{tier="cpu"}
    cpu_blocks_evicted_lru      tierkv_policy_blocks_evicted_total{tier="cpu", policy="lru"}
    hit_tokens_cpu              tierkv_tier_hit_tokens_total{tier="cpu"}
    moved_bytes_gpu_cpu         tierkv_link_moved_bytes_total{source="gpu", destination="cpu"}
    move_failures_late          tierkv_cause_move_failures_total{cause="late"}
    finished_stop               tierkv_reason_finished_total{reason="stop"}
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import EngineDeadError
from tierkv.metrics import kind_of
from tierkv.types import TierName

PATIENCE_S = 0.5
"""How long a scrape waits for an engine that is in the middle of a step."""

_TIER = "|".join(tier.value for tier in TierName)
_LABELLED = (
    ("policy", re.compile(rf"(?P<tier>{_TIER})_(?P<name>blocks_evicted)_(?P<policy>\w+)")),
    ("tier", re.compile(rf"(?P<tier>{_TIER})_(?P<name>\w+)")),
    ("link", re.compile(rf"(?P<name>\w+)_(?P<source>{_TIER})_(?P<destination>{_TIER})")),
    ("tier", re.compile(rf"(?P<name>\w+)_(?P<tier>{_TIER})")),
    ("cause", re.compile(r"(?P<name>move_failures)_(?P<cause>\w+)")),
    ("reason", re.compile(r"(?P<name>finished)_(?P<reason>\w+)")),
)

Values = Mapping[str, float]
_Family = CounterMetricFamily | GaugeMetricFamily


class EngineValues(Collector):
    """The engine's metrics, refreshed before a scrape as far as the engine answers in time."""

    def __init__(self, engine: AsyncLLM, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._values: Values = {}
        self._taken_s: float | None = None
        self._question: asyncio.Task[None] | None = None
        registry.register(self)

    @property
    def values(self) -> Values:
        """Name to number, as last known; empty before the engine first answered."""
        return self._values

    async def refresh(self, patience_s: float = PATIENCE_S) -> None:
        """Ask the engine, and return when it has answered or patience is over.

        A question that is not answered in time stays asked: the next scrape finds its answer.
        """
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._ask())
        await asyncio.wait({self._question}, timeout=patience_s)

    async def _ask(self) -> None:
        try:
            found = await self._engine.metrics()
        except EngineDeadError:
            return  # `engine_up` says so
        self._values = {n: v for n, v in found.items() if isinstance(v, int | float)}
        self._taken_s = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        up = "1 while the engine process lives, else 0"
        yield GaugeMetricFamily("tierkv_engine_up", up, value=float(not self._engine.is_dead))
        if self._taken_s is None:
            return
        yield GaugeMetricFamily(
            "tierkv_engine_metrics_age_seconds",
            "since the engine gave the numbers shown here",
            value=time.monotonic() - self._taken_s,
        )
        yield from families(self._values)


def families(values: Values) -> Iterable[Metric]:
    """The families of the engine's numbers: each by its name, and by label where it has some."""
    found: dict[str, _Family] = {}
    for name, value in values.items():
        _add(found, name, name, {}, value)
        if (labelled := labels_of(name)) is not None:
            family, labels = labelled
            _add(found, name, family, labels, value)
    return found.values()


def labels_of(name: str) -> tuple[str, dict[str, str]] | None:
    """The family with labels that a number belongs to, None for most: see the module's text."""
    for kind, pattern in _LABELLED:
        if match := pattern.fullmatch(name):
            labels = match.groupdict()
            return f"{kind}_{labels.pop('name')}", labels
    return None


def _add(
    found: dict[str, _Family], name: str, family: str, labels: dict[str, str], value: float
) -> None:
    metric = found.get(family)
    if metric is None:
        text = f"engine metric {name}" if not labels else f"engine metrics such as {name}"
        is_counter = kind_of(name) == "counter"
        make: type[_Family] = CounterMetricFamily if is_counter else GaugeMetricFamily
        metric = found[family] = make(f"tierkv_{family}", text, labels=list(labels))
    metric.add_metric(list(labels.values()), value)
