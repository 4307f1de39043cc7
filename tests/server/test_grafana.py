"""docs/grafana.json shows metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_app import LiveApp, live_app
from prometheus_client.parser import text_string_to_metric_families

from tierkv.server.app import AppSettings

METRIC = re.compile(r"\b(?:tierkv|process)_\w+|\bvllm:\w+")
BY = re.compile(r"by \(([^)]*)\)")


@pytest.fixture(scope="module")
def tiered(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    options: dict[str, Any] = {
        "offload": "cpu,nvme",
        "cpu_cache_size": "4MiB",
        "nvme_cache_size": "16MiB",
        "nvme_path": str(tmp_path_factory.mktemp("nvme")),
    }
    settings = AppSettings(["tiny"])
    with live_app(servable, settings, num_gpu_blocks=64, num_threads=1, **options) as app:
        yield app


@pytest.fixture(scope="module")
def labels(tiered: LiveApp) -> dict[str, set[str]]:
    """Each sample's name and its labels, with those that Prometheus adds."""
    tiered.post("completions", prompt="hello", max_tokens=2)
    tiered.http.get("/metrics")  # so that a response is counted
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{tiered.url}/metrics").text):
        for sample in family.samples:
            found[sample.name] = {*sample.labels, "job", "instance"}
    return found


@pytest.fixture(scope="module")
def dashboard(repository: Path) -> dict[str, Any]:
    text = (repository / "docs/grafana.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def queries(dashboard: dict[str, Any]) -> list[str]:
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [target["expr"] for target in targets]


def test_every_metric_shown_exists(dashboard: dict[str, Any], labels: dict[str, set[str]]) -> None:
    shown = {name for query in queries(dashboard) for name in METRIC.findall(query)}
    shown |= set(METRIC.findall(json.dumps(dashboard["templating"])))
    assert len(shown) > 40
    assert shown <= labels.keys()


def test_every_label_shown_exists(dashboard: dict[str, Any], labels: dict[str, set[str]]) -> None:
    for query in queries(dashboard):
        names = [label.strip() for group in BY.findall(query) for label in group.split(",")]
        for name in names:
            assert any(name in labels[metric] for metric in METRIC.findall(query)), query


def test_panels_are_apart(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
