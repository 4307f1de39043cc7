"""Limits, ends and refusals read from configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import REFUSED
from transformers import AutoModelForCausalLM, BloomConfig, GenerationConfig, LlamaConfig

from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.model import facts


def _llama(**rope: Any) -> LlamaConfig:
    parameters = {"rope_theta": 1e4, **rope} if rope else None
    return LlamaConfig(max_position_embeddings=4096, rope_parameters=parameters)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
            32768,
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
            4096,
        ),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
                "original_max_position_embeddings": 1024,
            },
            1024,
        ),
    ],
)
def test_longest_context(rope: dict[str, Any], length: int) -> None:
    assert facts.max_positions(_llama(**rope)) == length


def test_a_config_without_a_limit_has_a_large_one() -> None:
    assert facts.max_positions(BloomConfig()) == 1 << 20


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [3, 4]}, 2, {3, 4}),
        ({"eos_token_id": 5}, 2, {5}),
        ({}, [2, 7], {2, 7}),
        (None, 2, {2}),
        (None, None, set()),
    ],
)
def test_eos_tokens(
    generation: dict[str, Any] | None, config: Any, ids: set[int], tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert facts.eos_token_ids(LlamaConfig(eos_token_id=config), tmp_path) == ids
    if generation is None:
        assert facts.eos_token_ids(LlamaConfig(eos_token_id=config), None) == ids


@pytest.mark.parametrize("ends", [3.0, "</s>", [2, "3"], {"id": 2}])
def test_eos_tokens_that_are_none(ends: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        facts.eos_token_ids(LlamaConfig(), tmp_path)


def test_eos_tokens_that_came_with_the_weights() -> None:
    config, loaded = LlamaConfig(eos_token_id=2), GenerationConfig(eos_token_id=[8, 9])
    assert facts.eos_token_ids(config, None, loaded) == {8, 9}
    assert facts.eos_token_ids(config, None, GenerationConfig()) == {2}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_say_why_before_weights_are_read(family: str) -> None:
    config = REFUSED[family]()
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    with pytest.raises(UnsupportedModelError) as caught:
        facts.check_config(config)
        facts.check_class(config, model_class)
    assert caught.value.option == "model" and len(caught.value.fix) > 20


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("LlamaConfig", {"alibi": True}, "ALiBi"),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "both directions"),
        ("DeepseekV3Config", {}, "MLA"),
        ("Llama4TextConfig", {}, "chunked_attention"),
        (
            "Llama4TextConfig",
            {"layer_types": ["full_attention"] * 48, "no_rope_layers": [1, 1, 1, 0] * 12},
            "place in the forward pass",
        ),
    ],
)
def test_refused_variants(name: str, values: dict[str, Any], reason: str) -> None:
    config = getattr(transformers, name)(**values)
    with pytest.raises(UnsupportedModelError, match=reason):
        facts.check_config(config)


def test_no_causal_model_of_that_type() -> None:
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        facts.check_class(LlamaConfig(), None)
