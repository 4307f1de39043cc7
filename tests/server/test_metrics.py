"""What Prometheus scrapes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import psutil
import pytest
from live_app import LiveApp
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tierkv.metrics import kind_of
from tierkv.server.metrics import FrontEndMetrics, steps_up_to
from tierkv.server.metrics_engine import EngineValues, families, labels_of

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(app: LiveApp) -> Samples:
    """Each sample by its name and labels."""
    response = httpx.get(f"{app.url}/metrics")  # without the key
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all samples of this name that have these labels."""
    wanted = frozenset(labels.items())
    found = [v for (n, given), v in samples.items() if n == name and wanted <= given]
    assert found, f"{name} {labels} is not there"
    return sum(found)


def growth(before: Samples, after: Samples, name: str, **labels: str) -> float:
    def total(samples: Samples) -> float:
        wanted = frozenset(labels.items())
        return sum(v for (n, given), v in samples.items() if n == name and wanted <= given)

    return total(after) - total(before)


def generate(app: LiveApp, **fields: Any) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "ignore_eos": True, **fields}
    assert app.post("completions", **body).status_code == 200


def test_every_metric_of_the_engine_is_there(app: LiveApp) -> None:
    generate(app)
    samples, names = scrape(app), set(app.metrics())
    for name in names:
        shown = f"tierkv_{name}_total" if kind_of(name) == "counter" else f"tierkv_{name}"
        assert (shown, frozenset()) in samples, name
    assert value(samples, "tierkv_engine_up") == 1
    assert value(samples, "tierkv_gpu_blocks") == 256
    assert value(samples, "tierkv_tier_blocks", tier="gpu") == 256


def test_requests_are_measured(app: LiveApp) -> None:
    before = scrape(app)
    generate(app, n=2, temperature=1.0)
    generate(app, stream=True)
    after = scrape(app)
    counts = {
        "time_to_first_token_seconds": 2,
        "inter_token_latency_seconds": 3 * 4,
        "e2e_request_latency_seconds": 2,
        "request_queue_time_seconds": 2,
        "request_prompt_tokens": 2,
        "request_generation_tokens": 2,
    }
    for name, count in counts.items():
        assert growth(before, after, f"tierkv_{name}_count") == count, name
        assert growth(before, after, f"vllm:{name}_count", model_name="tiny") == count, name
    assert growth(before, after, "tierkv_request_prompt_tokens_sum") == 10
    assert growth(before, after, "tierkv_request_generation_tokens_sum") == 15
    assert growth(before, after, "tierkv_requests_finished_total", finish_reason="length") == 3
    first, whole = (
        growth(before, after, f"tierkv_{name}_sum")
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds")
    )
    assert 0 < first < whole


def test_responses_are_counted_by_route_and_status(app: LiveApp) -> None:
    before = scrape(app)
    generate(app)
    app.post("completions", prompt="")
    app.http.get("/v1/models/org/also-tiny")
    app.http.get("/nothing/here")
    for route, status in (
        ("/v1/completions", "200"),
        ("/v1/completions", "400"),
        ("/v1/models/{name:path}", "200"),
        ("unknown", "404"),
    ):
        labels = {"route": route, "status": status}
        deadline = time.monotonic() + 60  # a request is counted just after its response
        while growth(before, scrape(app), "tierkv_http_requests_total", **labels) != 1:
            assert time.monotonic() < deadline, labels


def test_a_stop_string_is_a_stop_with_its_queue_time(app: LiveApp) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 40}
    text = app.post("completions", **body).json()["choices"][0]["text"]
    stop = next(c for c in text[2:] if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    before = scrape(app)
    app.post("completions", **body, stop=stop)
    after = scrape(app)
    assert growth(before, after, "tierkv_requests_finished_total", finish_reason="stop") == 1
    assert growth(before, after, "tierkv_request_queue_time_seconds_count") == 1


VLLM_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "request_success_total",
    "num_preemptions_total",
)


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_the_names_of_vllm_are_there(app: LiveApp, name: str) -> None:
    generate(app)
    value(scrape(app), f"vllm:{name}", model_name="tiny", engine="0")


def test_vllm_counters_are_the_engine_s(app: LiveApp) -> None:
    before = scrape(app)
    generate(app, prompt="a prompt that is longer than two blocks of sixteen tokens each")
    generate(app, prompt="a prompt that is longer than two blocks of sixteen tokens each")
    after = scrape(app)
    assert growth(before, after, "vllm:generation_tokens_total") == 10
    assert growth(before, after, "vllm:prompt_tokens_total") == 2 * 62
    assert growth(before, after, "vllm:prefix_cache_hits_total") >= 48
    assert growth(before, after, "vllm:request_success_total", finished_reason="length") == 2


def test_openmetrics_for_whom_asks_for_it(app: LiveApp) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    response = httpx.get(f"{app.url}/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


# -- an engine that does not answer ----------------------------------------------------------------


class BusyEngine:
    """Answers once it is told that its step is over."""

    is_dead = False

    def __init__(self) -> None:
        self.step_is_over = asyncio.Event()
        self.num_asked = 0

    async def metrics(self) -> dict[str, Any]:
        self.num_asked += 1
        await self.step_is_over.wait()
        return {"steps": 7, "running": 2}


def test_a_busy_engine_holds_up_no_scrape() -> None:
    async def scrape_twice() -> None:
        engine: Any = BusyEngine()
        values = EngineValues(engine, CollectorRegistry())
        begun = time.monotonic()
        for _ in range(3):
            await values.refresh(0.05)
        assert time.monotonic() - begun < 2
        assert (values.values, engine.num_asked) == ({}, 1)
        assert [family.name for family in values.collect()] == ["tierkv_engine_up"]
        engine.step_is_over.set()
        await values.refresh(60)
        assert values.values == {"steps": 7, "running": 2}
        engine.step_is_over.clear()
        await values.refresh(0.01)
        assert values.values["steps"] == 7  # as last known

    asyncio.run(scrape_twice())


def test_a_stopped_engine_is_shown_as_last_known(app: LiveApp) -> None:
    generate(app)
    before, process = scrape(app), psutil.Process(app.engine._client.process.pid)
    process.suspend()
    try:
        begun = time.monotonic()
        during = scrape(app)
        took = time.monotonic() - begun
    finally:
        process.resume()
    assert took < 5
    assert value(during, "tierkv_steps_total") == value(before, "tierkv_steps_total")
    assert value(during, "tierkv_engine_metrics_age_seconds") >= 0.5
    assert value(during, "tierkv_engine_up") == 1
    generate(app)
    assert growth(before, scrape(app), "tierkv_steps_total") > 0


# -- names and bounds ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "labels"),
    [
        ("cpu_blocks_free", "tier_blocks_free", {"tier": "cpu"}),
        ("gpu_blocks_evicted", "tier_blocks_evicted", {"tier": "gpu"}),
        (
            "nvme_blocks_evicted_s3fifo",
            "policy_blocks_evicted",
            {"tier": "nvme", "policy": "s3fifo"},
        ),
        ("hit_tokens_nvme", "tier_hit_tokens", {"tier": "nvme"}),
        (
            "moved_bytes_gpu_cpu",
            "link_moved_bytes",
            {"source": "gpu", "destination": "cpu"},
        ),
        ("move_failures_io_error", "cause_move_failures", {"cause": "io_error"}),
        ("finished_stop", "reason_finished", {"reason": "stop"}),
    ],
)
def test_names_that_hold_labels(name: str, family: str, labels: dict[str, str]) -> None:
    assert labels_of(name) == (family, labels)
    shown = {found.name for found in families({name: 1})}
    assert shown == {f"tierkv_{name}", f"tierkv_{family}"}


@pytest.mark.parametrize("name", ["steps", "moves_in_flight", "hit_tokens", "offers_waiting"])
def test_most_names_hold_none(name: str) -> None:
    assert labels_of(name) is None


def test_bounds_reach_the_longest_prompt() -> None:
    assert steps_up_to(1) == [1]
    assert steps_up_to(40) == [1, 2, 5, 10, 20, 50]
    assert steps_up_to(100) == [1, 2, 5, 10, 20, 50, 100]


def test_registries_are_each_application_s_own() -> None:
    first, second = FrontEndMetrics(100), FrontEndMetrics(100)
    first.finished.labels("stop").inc()
    assert b'finish_reason="stop"} 0.0' in second.page("")[0]
