"""What the tracing pass finds out about attention layers, and whom it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, VOCAB_SIZE, build_model

from tierkv.cache.layout import KVLayout, layer_windows
from tierkv.errors import UnsupportedModelError
from tierkv.model.trace import takes_kwargs, trace_layers

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": None,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_what_the_config_promises(family: str) -> None:
    config = FAMILIES[family]()
    layers = trace_layers(build_model(config))
    assert tuple(layer.window for layer in layers) == layer_windows(config)
    assert [layer.index for layer in layers] == list(range(config.num_hidden_layers))
    layout = KVLayout.from_config(config, 16, "float32")
    for layer in layers:
        assert layer.num_kv_heads == layout.num_kv_heads
        assert layer.key_dim == layer.value_dim == layout.head_dim
        assert layer.num_heads == config.num_attention_heads


@pytest.mark.parametrize("window", [1, 2, 4095, 4096, 100_000])
def test_windows_longer_than_the_trace_are_exact(window: int) -> None:
    config = FAMILIES["mistral"]()
    config.sliding_window = window
    assert {layer.window for layer in trace_layers(build_model(config))} == {window}


def test_it_knows_who_hands_keyword_arguments_down() -> None:
    llama, stablelm = (build_model(FAMILIES[name]()) for name in ("llama", "stablelm"))
    assert takes_kwargs(llama) and takes_kwargs(stablelm)
    assert all(layer.has_step for layer in trace_layers(llama))
    assert not any(layer.has_step for layer in trace_layers(stablelm))


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("BertConfig", {}, "sees later tokens"),
        ("DogeConfig", {"num_key_value_heads": 2}, "builds its own attention mask"),
        ("DiffLlamaConfig", {"num_key_value_heads": 2}, "not each once"),
        (
            "Llama4TextConfig",
            {
                "num_key_value_heads": 2,
                "head_dim": 16,
                "attention_chunk_size": 32,
                "num_local_experts": 2,
                "intermediate_size_mlp": 96,
            },
            "neither everything nor a fixed window",
        ),
        (
            "DeepseekV2Config",
            {
                "num_key_value_heads": 4,
                "kv_lora_rank": 16,
                "q_lora_rank": None,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "first_k_dense_replace": 3,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
            },
            "keys have 24 elements per head, its values 16",
        ),
    ],
)
def test_refusals(name: str, values: dict[str, Any], reason: str) -> None:
    config = getattr(transformers, name)(**{**SMALL, **values})
    with pytest.raises(UnsupportedModelError, match=reason):
        trace_layers(build_model(config))


def test_attention_that_bypasses_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(FAMILIES["llama"]())
    for layer in model.model.layers:
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None)
        )
    with pytest.raises(UnsupportedModelError, match="bypass"):
        trace_layers(model)


def test_a_layer_without_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(FAMILIES["llama"]())
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(UnsupportedModelError, match="does not say which layer"):
        trace_layers(model)


def test_a_layer_that_goes_its_own_way() -> None:
    model, other = (build_model(FAMILIES[name]()) for name in ("llama", "llama-mqa"))
    model.model.layers[2] = other.model.layers[2]
    with pytest.raises(UnsupportedModelError, match=r"its 3 layers .* as \[0, 1\]"):
        trace_layers(model)


def test_layers_of_different_shape() -> None:
    model, other = (build_model(FAMILIES[name]()) for name in ("llama", "llama-mqa"))
    model.model.layers[2] = other.model.layers[2]
    model.model.layers[2].self_attn.config = model.config
    with pytest.raises(UnsupportedModelError, match=r"differ.*\(1, 16, 16\), \(2, 16, 16\)"):
        trace_layers(model)


def test_a_forward_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(FAMILIES["llama"]())

    def fail(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        raise KeyError("past_key_values")

    monkeypatch.setattr(model.model.layers[0], "forward", fail)
    with pytest.raises(UnsupportedModelError, match=r"fails without a KV cache.*past_key_values"):
        trace_layers(model)
