"""Metrics, log lines and traces of every request, wherever its handler is.

`ObservedApp` goes around the application: it gives each HTTP request an id and a record. A
`GenerationWatch` goes with each engine request and adds to the record of the task that made it.
"""

from __future__ import annotations

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tierkv import logs
from tierkv.engine.async_llm import AsyncLLM
from tierkv.engine.output_processor import RequestState
from tierkv.engine.outputs import SequenceOutput
from tierkv.errors import TierkvError
from tierkv.server import records
from tierkv.server.errors import CLIENT_CLOSED_REQUEST, REQUEST_ID_HEADER
from tierkv.server.metrics import FrontEndMetrics
from tierkv.server.metrics_engine import EngineValues
from tierkv.server.metrics_vllm import VllmNames
from tierkv.server.records import Generation, RequestRecord
from tierkv.server.tracing import Tracing

access = logging.getLogger("tierkv.access")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""Clients may send any word; each would be a series of its own."""

QUIET_ROUTES = ("/health", "/ping", "/metrics", "/dashboard/request")
"""Probes, scrapes and open windows ask every few seconds: nobody wants a line for each."""


class Observability:
    """What is measured, logged and traced of one application.

    Args:
        engine: its requests are watched from now on.
        model_name: label of the metrics under vLLM's names.
        tracing: where spans go, None for nowhere.
        log_requests: log a line for each request.
    """

    def __init__(
        self, engine: AsyncLLM, *, model_name: str, tracing: Tracing | None, log_requests: bool
    ) -> None:
        self.metrics = FrontEndMetrics(engine.info.max_model_len)
        self.engine_values = EngineValues(engine, self.metrics.registry)
        self.tracing = tracing
        self._log_requests = log_requests
        VllmNames(model_name, self.metrics, self.engine_values)
        engine.make_watch = lambda: GenerationWatch(self, records.current.get())

    def begin(self, scope: Scope) -> RequestRecord:
        """A request has come; the task that serves it is the current one."""
        headers = Headers(scope=scope)
        identity = records.request_id_from(headers.get(REQUEST_ID_HEADER))
        record = RequestRecord(identity, scope["method"], scope["path"])
        records.current.set(record)
        logs.request_id.set(identity)
        if self.tracing is not None:
            record.span = self.tracing.begin(record, dict(headers))
        return record

    def end(self, record: RequestRecord, scope: Scope) -> None:
        """Its response is complete, or was given up."""
        record.route = getattr(scope.get("route"), "path", "unknown")
        method = record.method if record.method in METHODS else "other"
        self.metrics.responses.labels(record.route, method, str(record.status)).inc()
        self.metrics.durations.labels(record.route).observe(time.perf_counter() - record.begun_s)
        if self.tracing is not None:
            self.tracing.end(record.span, record)
        if self._log_requests and record.route not in QUIET_ROUTES:
            access.info("request", extra={"fields": record.log_fields()})

    def generated(self, generation: Generation, record: RequestRecord | None) -> None:
        """An engine request has ended; `record` is the HTTP request that it served."""
        self.metrics.latency.observe(generation.latency_s)
        self.metrics.prompt_tokens.observe(generation.num_prompt_tokens)
        self.metrics.generated_tokens.observe(generation.num_generated_tokens)
        for reason in generation.finish_reasons:
            self.metrics.finished.labels(reason).inc()
        if record is not None:
            record.generations.append(generation)
            if self.tracing is not None:
                self.tracing.generation(record.span, generation)


class GenerationWatch:
    """Measures one engine request as its outputs arrive; see `tierkv.engine.async_llm.Watch`."""

    def __init__(self, observability: Observability, record: RequestRecord | None) -> None:
        self._observability, self._record = observability, record
        self._begun_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._queue_s: float | None = None
        self._last_s: dict[int, float] = {}

    def on_output(self, news: SequenceOutput) -> None:
        times = news.metrics
        if self._queue_s is None and times is not None and times.first_scheduled_s is not None:
            self._queue_s = times.first_scheduled_s - times.arrival_s
            self._observability.metrics.queue_time.observe(self._queue_s)
        if news.new_token_ids:
            self._on_tokens(news.index, len(news.new_token_ids))

    def _on_tokens(self, index: int, count: int) -> None:
        now, metrics = time.perf_counter(), self._observability.metrics
        if self._first_token_s is None:
            self._first_token_s = now - self._begun_s
            metrics.first_token.observe(self._first_token_s)
        if (last := self._last_s.get(index)) is not None:
            for _ in range(count):
                metrics.between_tokens.observe((now - last) / count)
        self._last_s[index] = now

    def on_end(self, state: RequestState, error: TierkvError | None) -> None:
        if error is None or self._first_token_s is not None:
            self._observability.generated(self._generation(state, error), self._record)

    def _generation(self, state: RequestState, error: TierkvError | None) -> Generation:
        otherwise = "error" if error is not None else "abort"
        return Generation(
            reply_id=state.shown_id,
            num_prompt_tokens=len(state.prompt_token_ids),
            num_cached_tokens=state.num_cached_tokens or 0,
            num_generated_tokens=sum(len(seq.token_ids) for seq in state.sequences),
            finish_reasons=[
                seq.finish_reason.value if seq.finish_reason is not None else otherwise
                for seq in state.sequences
            ],
            queue_s=self._queue_s,
            first_token_s=self._first_token_s,
            latency_s=time.perf_counter() - self._begun_s,
        )


class ObservedApp:
    """ASGI middleware: an id, a record, a log line and a span for each HTTP request."""

    def __init__(self, app: ASGIApp, observability: Observability) -> None:
        self._app, self._observability = app, observability

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._observability.begin(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            record.status = record.status or 500
            raise
        finally:
            record.status = record.status or CLIENT_CLOSED_REQUEST
            self._observability.end(record, scope)
