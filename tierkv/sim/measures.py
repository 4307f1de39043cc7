"""What a replay is measured by.

hit rate    prompt tokens whose KV a tier had / prompt tokens (of it, the part of each tier)
TTFT        first token - arrival; ITL: between two tokens of a sequence
TPOT        the mean of these in one request
good        TTFT and TPOT are within the SLO
goodput     good requests per second
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierkv.engine.outputs import SequenceOutput
from tierkv.sim.quantiles import Quantiles
from tierkv.sim.trace import TraceRequest

if TYPE_CHECKING:
    from tierkv.sim.machine import World

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(slots=True, frozen=True)
class Slo:
    """Seconds until the first token, and per further token, that a good request takes at most."""

    ttft_s: float = 10.0
    tpot_s: float = 0.1


DEFAULT_SLO = Slo()


@dataclass(slots=True)
class Measures:
    """The result of one replay; seconds, bytes and tokens as plain numbers.

    Attributes:
        num_requests: that ended; num_excluded: left out because the pool could not hold them.
        duration_s: from time 0 to the end of the last one.
        hit_rate: of prompt tokens; hit_rate_gpu, hit_rate_cpu, hit_rate_nvme: its parts.
        ttft_s, itl_s, tpot_s: p50, p90, p99 and mean.
        ttft_cdf: `(seconds, share)`.
        prompt_tokens_per_s, output_tokens_per_s, requests_per_s: throughput.
        goodput: good requests per second; good_share: of the requests.
        busy_share: of the time, the executor ran.
        promoted_bytes, demoted_bytes: towards the pool, away from it; nvme_written_bytes: of all
            writes to the persistent tier.
        counters: of the engine (docs/metrics.md).
    """

    num_requests: int = 0
    num_excluded: int = 0
    duration_s: float = 0.0
    hit_rate: float = 0.0
    hit_rate_gpu: float = 0.0
    hit_rate_cpu: float = 0.0
    hit_rate_nvme: float = 0.0
    ttft_s: dict[str, float] = dataclasses.field(default_factory=dict)
    itl_s: dict[str, float] = dataclasses.field(default_factory=dict)
    tpot_s: dict[str, float] = dataclasses.field(default_factory=dict)
    ttft_cdf: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    goodput: float = 0.0
    good_share: float = 0.0
    busy_share: float = 0.0
    preemptions: int = 0
    promoted_bytes: int = 0
    demoted_bytes: int = 0
    nvme_written_bytes: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    block_lookups: int = 0
    counters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Tally:
    """Counts requests as they end.

    Args:
        slo: what is good.
    """

    def __init__(self, slo: Slo) -> None:
        self.num_excluded = 0
        self._slo = slo
        self._ttft, self._tpot = Quantiles(), Quantiles()
        self._num_good = 0
        self._output_tokens = 0
        self._lookups = 0
        self._end_s = 0.0

    def ended(self, item: TraceRequest, output: SequenceOutput) -> None:
        """A request has its last token."""
        times = output.metrics
        assert times is not None and times.first_token_s is not None
        assert times.finished_s is not None
        ttft_s = times.first_token_s - times.arrival_s
        rest = max(1, item.output_tokens - 1)
        tpot_s = (times.finished_s - times.first_token_s) / rest
        self._ttft.add(ttft_s)
        if item.output_tokens > 1:
            self._tpot.add(tpot_s)
        self._num_good += ttft_s <= self._slo.ttft_s and tpot_s <= self._slo.tpot_s
        self._output_tokens += item.output_tokens
        self._lookups += item.num_blocks
        self._end_s = max(self._end_s, times.finished_s)

    def measures(self, world: World) -> Measures:
        """All of it, after the last request."""
        counters = world.core.metrics()
        seconds = self._end_s or 1.0
        queried = counters["queried_tokens"] or 1
        lower = counters["hit_tokens_cpu"] + counters["hit_tokens_nvme"]
        return Measures(
            num_requests=self._ttft.count,
            num_excluded=self.num_excluded,
            duration_s=self._end_s,
            hit_rate=counters["hit_tokens"] / queried,
            hit_rate_gpu=(counters["hit_tokens"] - lower) / queried,
            hit_rate_cpu=counters["hit_tokens_cpu"] / queried,
            hit_rate_nvme=counters["hit_tokens_nvme"] / queried,
            ttft_s=_summary(self._ttft),
            itl_s=_summary(world.gaps),
            tpot_s=_summary(self._tpot),
            ttft_cdf=self._ttft.cdf(),
            prompt_tokens_per_s=counters["queried_tokens"] / seconds,
            output_tokens_per_s=self._output_tokens / seconds,
            requests_per_s=self._ttft.count / seconds,
            goodput=self._num_good / seconds,
            good_share=self._num_good / max(1, self._ttft.count),
            busy_share=world.executor.busy_s / seconds,
            preemptions=counters["preemptions"],
            promoted_bytes=_moved(counters, "cpu_gpu", "nvme_gpu", "nvme_cpu"),
            demoted_bytes=_moved(counters, "gpu_cpu", "gpu_nvme", "cpu_nvme"),
            nvme_written_bytes=_moved(counters, "gpu_nvme", "cpu_nvme"),
            prefetch_useful=counters.get("prefetch_useful", 0),
            prefetch_late=counters.get("prefetch_late", 0),
            prefetch_wasted=counters.get("prefetch_wasted", 0),
            block_lookups=self._lookups,
            counters=counters,
        )


def _summary(values: Quantiles) -> dict[str, float]:
    found = {name: values.quantile(share) for name, share in _SHARES.items()}
    return found | {"mean": values.mean}


def _moved(counters: dict[str, Any], *links: str) -> int:
    return sum(counters.get(f"moved_bytes_{link}", 0) for link in links)
