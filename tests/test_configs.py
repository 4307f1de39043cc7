"""The YAML files in `configs/`: `tierkv serve` accepts each of them, and serves from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from servable import running_server

from tierkv.cli.serve import make_parser, read
from tierkv.config import EngineConfig, per_tier
from tierkv.policies import registry

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
STORIES = {"agents", "batch", "chat", "long-documents", "rag", "small-gpu"}
STARTED = "small-gpu"  # in every run of the tests; the others in full runs
POLICIES = {
    "load_policy": "load",
    "preemption_mode": "preemption",
    "preemption_victim": "victim",
    "scheduling_policy": "order",
}


def test_there_is_one_for_each_story() -> None:
    assert {path.stem for path in CONFIGS} == STORIES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_accepted(path: Path) -> None:
    _, config = read(make_parser().parse_args(["--config", str(path)]))
    assert config.model == "demo"
    assert f"tierkv serve --config configs/{path.name}" in path.read_text(encoding="utf-8")
    check_policies(config)


def check_policies(config: EngineConfig) -> None:
    """Their names are checked by the engine: after the model is loaded."""
    for option, kind in POLICIES.items():
        registry.create(kind, getattr(config, option))
    for option, kind in (("eviction_policy", "eviction"), ("admission_policy", "admission")):
        for spec in per_tier(option, config).values():
            registry.create(kind, spec)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_sets_each_option_once_and_spells_it_with_dashes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = [line.partition(":")[0] for line in text.splitlines() if line and line[0] != "#"]
    assert names == list(yaml.safe_load(text))
    assert not any("_" in name for name in names)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem == STARTED else pytest.mark.full, id=path.stem)
        for path in CONFIGS
    ],
)
def test_a_config_serves(path: Path) -> None:
    with running_server("--config", str(path), "--num-threads", "1") as server:
        question: Any = [{"role": "user", "content": "Tell me a story."}]
        reply = server.client().chat.completions.create(
            model="demo", messages=question, max_tokens=8, temperature=0
        )
        assert reply.choices[0].message.content
