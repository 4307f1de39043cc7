"""Engines over stores that are sick, and what a healthy one answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sick_tiers import NUM_PROMPTS, Ward, serve, watchdog
from tier_victim import config
from tiny_models import save_model

from tierkv.engine.core import EngineCore

LIMIT_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[int, list[int]]:
    core = EngineCore.from_config(config(str(model), num_gpu_blocks=2000))
    return serve(core, list(range(NUM_PROMPTS)))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with watchdog(LIMIT_S):
        yield


@pytest.fixture
def ward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ward]:
    made = Ward(monkeypatch)
    yield made
    made.release()
