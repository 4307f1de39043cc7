"""Every causal language model that the installed transformers knows: served exactly, or refused.

Configs are shrunk by field name; a type whose tiny model cannot be built, or which transformers
itself cannot run without a cache, is skipped. What must never happen is a model that loads and
computes something else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_steps import eager_logits, make_runner, random_texts, run_chunked
from tiny_models import STD, build_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tierkv.errors import UnsupportedModelError
from tierkv.model import attention, facts, trace
from tierkv.model.loaded import LoadedModel
from tierkv.model.probe import probe

_VOCAB = 211
_MAX_PARAMETERS = 40_000_000
_TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), _VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "mlp_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("initializer_range", "init_std"), STD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "head_dim": 16,
    "v_head_dim": 16,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_QUICK = ("apertus", "biogpt", "ernie4_5", "exaone4", "glm4_moe", "lfm2", "nemotron", "olmo3")


def _tiny_config(model_type: str) -> Any:
    """The type's config with every known field shrunk."""
    cls = CONFIG_MAPPING[model_type]
    try:
        base = cls()
        if "text_config" in (getattr(cls, "sub_configs", None) or {}):
            return cls(text_config={k: v for k, v in _TINY.items() if hasattr(base.text_config, k)})
        return cls(**{key: value for key, value in _TINY.items() if hasattr(base, key)})
    except Exception as error:  # whatever a config class does not like about foreign sizes
        pytest.skip(f"no tiny config: {type(error).__name__}")


def _tiny_model(config: Any) -> PreTrainedModel:
    """A model that transformers itself can run whole, without a cache."""
    try:
        with torch.device("meta"):
            size = sum(w.numel() for w in AutoModelForCausalLM.from_config(config).parameters())
        if size > _MAX_PARAMETERS:
            pytest.skip(f"not tiny: {size} parameters")
        model = build_model(config)
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits
    except Exception as error:  # transformers' own failure on a size, or a missing dependency
        pytest.skip(f"transformers cannot run it: {type(error).__name__}")
    if not torch.isfinite(logits).all():
        pytest.skip("transformers computes NaN")
    return model


def _load(config: Any) -> LoadedModel:
    """What `load_model` does, from a config in memory."""
    facts.check_config(config)
    mapping = AutoModelForCausalLM._model_mapping
    facts.check_class(config, mapping.get(type(config), None))
    model = _tiny_model(config)
    layers = trace.trace_layers(model)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return LoadedModel(
        model=model,
        config=config,
        tokenizer_path="",
        device=torch.device("cpu"),
        dtype=torch.float32,
        layers=layers,
        max_model_len=facts.max_positions(config),
        eos_token_ids=frozenset(),
        vocab_size=_VOCAB,
        fingerprint=b"",
    )


def _check(model_type: str) -> None:
    """Served exactly (beyond what the probe looks at), or refused with a reason."""
    config = _tiny_config(model_type)
    try:
        loaded = _load(config)
    except UnsupportedModelError as error:
        assert len(error.fix) > 20
        return
    result = probe(loaded)
    texts = random_texts((230, 41), _VOCAB)
    found = run_chunked(make_runner(loaded, 16, 20), texts, max_chunk=90)
    expected = [eager_logits(loaded, text) for text in texts]
    pairs = zip(found, expected, strict=True)
    worst = max(float((got - want).abs().max()) for got, want in pairs)
    if result.is_match:
        assert worst < 1e-3, f"the probe accepts it ({result}), yet logits differ by {worst}"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", [name for name in _QUICK if name in _TYPES])
def test_a_few_more_types(model_type: str) -> None:
    _check(model_type)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in _TYPES if name not in _QUICK])
def test_every_type(model_type: str) -> None:
    _check(model_type)
