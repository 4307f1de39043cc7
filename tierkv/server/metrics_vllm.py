"""The metrics under the names that vLLM's users have dashboards and alerts for.

Nothing is measured twice: histograms are those of the front end under another name, counters and
gauges come from the engine's numbers. Labels are vLLM's `model_name` and `engine`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tierkv.server.metrics import FrontEndMetrics
from tierkv.server.metrics_engine import EngineValues, Values

GAUGES = {
    "num_requests_running": ("running", "sequences that run"),
    "num_requests_waiting": ("waiting", "sequences that wait for their turn"),
}
COUNTERS = {
    "prompt_tokens": ("queried_tokens", "prompt tokens of requests admitted"),
    "generation_tokens": ("generated_tokens", "tokens generated"),
    "prefix_cache_queries": ("queried_tokens", "prompt tokens looked up in the cache"),
    "prefix_cache_hits": ("hit_tokens", "of those, found in any tier"),
    "num_preemptions": ("preemptions", "running sequences stopped for others"),
}
USAGE_NAMES = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
"""The second is the first one's name before vLLM 0.10."""

SUCCESS = ("stop", "length", "abort")


class VllmNames(Collector):
    """Shows `vllm:...` beside the metrics of this project.

    Args:
        model_name: the value of the label.
        front: measured by the front end.
        engine: the engine's numbers.
    """

    def __init__(self, model_name: str, front: FrontEndMetrics, engine: EngineValues) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._engine = engine
        self._histograms = {
            "time_to_first_token_seconds": front.first_token,
            "inter_token_latency_seconds": front.between_tokens,
            "time_per_output_token_seconds": front.between_tokens,  # before vLLM 0.11
            "e2e_request_latency_seconds": front.latency,
            "request_queue_time_seconds": front.queue_time,
            "request_prompt_tokens": front.prompt_tokens,
            "request_generation_tokens": front.generated_tokens,
        }
        front.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for name, histogram in self._histograms.items():
            yield self._renamed(name, histogram)
        values = self._engine.values
        for name, (source, text) in GAUGES.items():
            if source in values:
                yield self._gauge(name, text, values[source])
        for name, (source, text) in COUNTERS.items():
            if source in values:
                yield self._counter(name, text, values[source])
        yield from self._usage(values)
        yield from self._successes(values)

    def _renamed(self, name: str, histogram: Histogram) -> Metric:
        (source,) = histogram.collect()
        shown = Metric(f"vllm:{name}", source.documentation, source.type)
        for sample in source.samples:
            suffix = sample.name.removeprefix(source.name)
            if suffix != "_created":
                labels = {**self._labels, **sample.labels}
                shown.add_sample(f"vllm:{name}{suffix}", labels, sample.value)
        return shown

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _usage(self, values: Values) -> Iterator[Metric]:
        if values.get("gpu_blocks"):
            for name in USAGE_NAMES:
                share = values["gpu_blocks_used"] / values["gpu_blocks"]
                yield self._gauge(name, "share of the pool's blocks that are held, 0 to 1", share)

    def _successes(self, values: Values) -> Iterator[Metric]:
        names = [*self._labels, "finished_reason"]
        family = CounterMetricFamily("vllm:request_success", "sequences that ended", labels=names)
        for reason in SUCCESS:
            family.add_metric([*self._labels.values(), reason], values.get(f"finished_{reason}", 0))
        yield family
