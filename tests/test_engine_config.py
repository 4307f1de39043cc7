"""Engine options given as keywords: types are checked as strictly as those of a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierkv.config import EngineConfig, per_tier
from tierkv.errors import ConfigError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("verify_model", "no"),
        ("enable_prefix_caching", "false"),
        ("enable_prefix_caching", None),
        ("trust_remote_code", 1),
        ("gpu_memory_utilization", "0.9"),
        ("gpu_memory_utilization", True),
        ("eviction_policy", 5),
        ("scheduling_policy", None),
        ("revision", 3),
        ("seed", "x"),
        ("seed", 2**63),
        ("num_threads", 100_000),
        ("model", None),
        ("model", 5),
        ("tokenizer", ""),
    ],
)
def test_wrong_types_name_the_option(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{option: value})
    assert caught.value.option == option


@pytest.mark.parametrize("text", ["lru,gpu=fifo", "lru,fifo,gpu=lru,cpu=sieve", "gpu=lru,gpu=lru"])
def test_a_policy_beside_those_of_tiers_is_not_dropped(text: str) -> None:
    with pytest.raises(ConfigError, match=r"gpu twice|one policy, or tier=policy"):
        per_tier("eviction_policy", EngineConfig(eviction_policy=text))


def test_a_path_is_a_model() -> None:
    config = EngineConfig(model=Path("/models/x"), tokenizer=Path("/models/y"))  # type: ignore[arg-type]
    assert (config.model, config.tokenizer) == ("/models/x", "/models/y")


def test_a_name_that_is_no_string_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        EngineConfig.from_mapping({5: 1})  # type: ignore[dict-item]
