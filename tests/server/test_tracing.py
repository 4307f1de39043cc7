"""Spans: one for each HTTP request, one in it for each generation."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_app import LiveApp, served

from tierkv.errors import ConfigError
from tierkv.server.app import AppSettings
from tierkv.server.tracing import Tracing, tracing_to

CALLER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
QUICK: dict[str, Any] = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True}


class Traced:
    """An application, and the spans that it has ended."""

    def __init__(self, app: LiveApp, exporter: Any) -> None:
        self.app, self._exporter = app, exporter

    def spans(self, count: int) -> list[Any]:
        """So many: a request's span ends just after its response."""
        deadline = time.monotonic() + 60
        while len(found := self._exporter.get_finished_spans()) < count:
            assert time.monotonic() < deadline, found
            time.sleep(0.01)
        self._exporter.clear()
        return list(found)


@pytest.fixture(scope="module")
def traced(app: LiveApp) -> Iterator[Traced]:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    with served(app.engine, AppSettings(["tiny"], tracing=tracing)) as traced_app:
        yield Traced(traced_app, exporter)
    tracing.close()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_generation_is_a_span_in_its_request_s(traced: Traced, is_streamed: bool) -> None:
    body = {**QUICK, "stream": is_streamed}
    headers = {"traceparent": CALLER, "X-Request-Id": "mine"}
    reply = traced.app.http.post("/v1/completions", json=body, headers=headers)
    assert reply.status_code == 200
    generation, request = traced.spans(2)
    assert request.name == "POST /v1/completions"
    assert format(request.context.trace_id, "032x") == CALLER.split("-")[1]
    assert format(request.parent.span_id, "016x") == CALLER.split("-")[2]
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["tierkv.request_id"] == "mine"
    assert generation.parent.span_id == request.context.span_id
    assert generation.attributes["gen_ai.usage.prompt_tokens"] == 5
    assert generation.attributes["gen_ai.usage.completion_tokens"] == 4
    assert generation.attributes["gen_ai.response.finish_reasons"] == ("length",)
    times = [
        generation.attributes[f"gen_ai.latency.{name}"]
        for name in ("time_in_queue", "time_to_first_token", "e2e")
    ]
    assert times == sorted(times) and times[0] >= 0
    assert generation.end_time - generation.start_time == pytest.approx(times[2] * 1e9, rel=0.01)


def test_errors_are_spans_without_generations(traced: Traced) -> None:
    traced.app.post("completions", prompt="")
    traced.app.http.get("/v1/models/org/tiny")
    bad, unknown = traced.spans(2)
    assert bad.attributes["http.response.status_code"] == 400
    assert unknown.name == "GET /v1/models/{name:path}"
    assert unknown.parent is None


def test_the_exporter_is_asked_for_only_with_an_endpoint() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    tracing = tracing_to("http://127.0.0.1:9/v1/traces")
    tracing.close()
    with pytest.raises(ConfigError, match="must be a URL"):
        tracing_to("127.0.0.1:4317")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'tierkv\[otel\]'"):
        tracing_to("http://127.0.0.1:9/v1/traces")
