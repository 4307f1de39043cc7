"""What Prometheus scrapes: the registry of one application, and what its front end measures.

Every application has a registry of its own. The engine's numbers are added to it by
`metrics_engine`, the names that vLLM's users know by `metrics_vllm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from tierkv import __version__

_MILLISECONDS = (1, 2.5, 5, 10, 20, 40, 60, 80, 100, 150, 200, 300, 500, 750, 1000, 2500)
_SHORT_S = tuple(milliseconds / 1000 for milliseconds in _MILLISECONDS)
FIRST_TOKEN_S = (*_SHORT_S, 5, 7.5, 10, 20, 40, 80, 160, 640)
BETWEEN_TOKENS_S = (*_SHORT_S, 5, 10, 20, 40)
REQUEST_S = (*_SHORT_S[8:], 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FINISH_REASONS = ("stop", "length", "abort", "error")


def steps_up_to(limit: int) -> list[int]:
    """Bounds 1, 2, 5, 10, 20, 50, ... up to the first that is not below `limit`."""
    bounds: list[int] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            bounds.append(digit * scale)
            if bounds[-1] >= limit:
                return bounds
        scale *= 10


class FrontEndMetrics:
    """What the server measures itself, in a registry that others may add to.

    Its families may be changed from any thread.

    Args:
        max_model_len: the longest prompt and output, for the bounds of token counts.

    Attributes:
        first_token, between_tokens, latency, queue_time: seconds of an engine request.
        prompt_tokens, generated_tokens: of an engine request.
        finished: sequences that ended, by reason.
        responses, durations: of HTTP requests.
        timeouts: requests aborted because their time was over.
    """

    def __init__(self, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._add_times()
        self._add_sizes(steps_up_to(max_model_len))
        self._add_http()
        text = "sequences that ended, by reason; `abort`: the client left, or time was over"
        self.finished = self._counter("requests_finished", text, ["finish_reason"])
        for reason in FINISH_REASONS:
            self.finished.labels(reason)
        version = self._gauge("build_info", "the version that serves", ["version"])
        version.labels(__version__).set(1)

    def _add_times(self) -> None:
        text = "from a request's arrival to its first token"
        self.first_token = self._histogram("time_to_first_token_seconds", text, FIRST_TOKEN_S)
        text = "between two tokens of a sequence"
        self.between_tokens = self._histogram("inter_token_latency_seconds", text, BETWEEN_TOKENS_S)
        text = "from a request's arrival to its end"
        self.latency = self._histogram("e2e_request_latency_seconds", text, REQUEST_S)
        text = "from a request's arrival in the engine to its first step"
        self.queue_time = self._histogram("request_queue_time_seconds", text, FIRST_TOKEN_S)

    def _add_sizes(self, bounds: Sequence[int]) -> None:
        text = "prompt tokens of a request"
        self.prompt_tokens = self._histogram("request_prompt_tokens", text, bounds)
        text = "tokens generated for a request, by all its samples together"
        self.generated_tokens = self._histogram("request_generation_tokens", text, bounds)

    def _add_http(self) -> None:
        text = "HTTP requests, by route, method and status code; 499: the client left"
        self.responses = self._counter("http_requests", text, ["route", "method", "status"])
        text = "from the head of an HTTP request to the end of its response"
        name = "http_request_duration_seconds"
        self.durations = self._histogram(name, text, REQUEST_S, ["route"])
        text = "requests that were aborted because their time was over"
        self.timeouts = self._counter("request_timeouts", text)

    def watch_queue(self, num_in_flight: Callable[[], int], limit: int) -> None:
        """Show how many sequences are in flight, and how many may be."""
        text = "sequences that the front end has accepted and not finished, running or waiting"
        self._gauge("sequences_in_flight", text).set_function(num_in_flight)
        self._gauge("sequences_limit", "beyond so many, requests get 503").set(limit)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The registry in the format that the scraper accepts, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _histogram(
        self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        return Histogram(f"tierkv_{name}", text, labels, buckets=bounds, registry=self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"tierkv_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"tierkv_{name}", text, labels, registry=self.registry)
