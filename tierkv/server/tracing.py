"""OpenTelemetry traces: a span for each HTTP request, and in it one for each generation.

The packages are optional (`pip install 'tierkv[otel]'`); nothing of them is imported without
`--otlp-traces-endpoint`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tierkv.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from tierkv.server.records import Generation, RequestRecord

SERVICE_NAME = "tierkv"


class Tracing:
    """Makes spans of what the server records.

    Args:
        provider: where they go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE_NAME)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def begin(self, record: RequestRecord, headers: dict[str, str]) -> Span:
        """The span of a request, a child of the caller's where it sent a `traceparent`."""
        return self._tracer.start_span(
            f"{record.method} {record.path}",
            context=self._propagator.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            attributes={
                "http.request.method": record.method,
                "url.path": record.path,
                "tierkv.request_id": record.request_id,
            },
        )

    def generation(self, span: Span, generation: Generation) -> None:
        """Add a generation that has ended just now; attributes are named as vLLM names them."""
        end = time.time()
        child = self._tracer.start_span(
            "llm_request",
            context=self._trace.set_span_in_context(span),
            start_time=_nanoseconds(end - generation.latency_s),
            attributes=_attributes(generation),
        )
        child.end(_nanoseconds(end))

    def end(self, span: Span, record: RequestRecord) -> None:
        """The response is complete."""
        span.update_name(f"{record.method} {record.route}")
        span.set_attribute("http.route", record.route)
        span.set_attribute("http.response.status_code", record.status)
        if record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what has not been sent, and stop."""
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _attributes(generation: Generation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.request.id": generation.reply_id,
        "gen_ai.usage.prompt_tokens": generation.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": generation.num_generated_tokens,
        "gen_ai.usage.cached_tokens": generation.num_cached_tokens,
        "gen_ai.response.finish_reasons": generation.finish_reasons,
        "gen_ai.latency.e2e": generation.latency_s,
        "gen_ai.latency.time_in_queue": generation.queue_s,
        "gen_ai.latency.time_to_first_token": generation.first_token_s,
    }
    return {name: value for name, value in found.items() if value is not None}


def tracing_to(endpoint: str) -> Tracing:
    """Traces that are sent in the background to an OTLP collector, as protobuf over HTTP.

    Args:
        endpoint: the full URL, as `http://localhost:4318/v1/traces`.

    Raises:
        ConfigError: OpenTelemetry's packages are not installed, or the endpoint is no URL.
    """
    if not endpoint.startswith(("http://", "https://")):
        fix = "must be a URL as http://localhost:4318/v1/traces (OTLP over HTTP, not gRPC)"
        raise ConfigError("otlp_traces_endpoint", endpoint, fix)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        fix = f"{error.name} is missing: pip install 'tierkv[otel]'"
        raise ConfigError("otlp_traces_endpoint", endpoint, fix) from None
    # `Resource.create` adds OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME.
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)
