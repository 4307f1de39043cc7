"""Tiny random models of every family, for tests: two to four layers, 200-odd tokens of vocabulary.

Weights have standard deviation 0.12, so that logits spread and near ties are rare. No model knows
an end-of-text token unless `eos_token_id` is given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 211
STD = 0.12

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": STD,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _config(name: str, **values: Any) -> Callable[[], PreTrainedConfig]:
    """A maker of small configs of class `name`; fields of `_BASE` it lacks are left out."""

    def make() -> PreTrainedConfig:
        cls = getattr(transformers, name)
        known = {*vars(cls()), *cls.attribute_map}
        base = {key: value for key, value in _BASE.items() if key in known}
        config: PreTrainedConfig = cls(**{**base, **values})
        return config

    return make


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt": _config("OPTConfig", ffn_dim=96, word_embed_proj_dim=32, dropout=0.0),
    "llama": _config("LlamaConfig"),
    "llama-mqa": _config("LlamaConfig", num_key_value_heads=1, tie_word_embeddings=True),
    "llama-rope-scaled": _config(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": _config("Qwen2Config", use_sliding_window=False),
    "qwen2-windowed": _config(
        "Qwen2Config", use_sliding_window=True, sliding_window=12, max_window_layers=1
    ),
    "qwen3": _config("Qwen3Config", head_dim=16),
    "mistral": _config("MistralConfig", sliding_window=8),
    "gemma": _config("GemmaConfig", head_dim=16),
    "gemma2": _config(
        "Gemma2Config",
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _config(
        "Gemma3TextConfig",
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
    ),
    "phi3": _config("Phi3Config", sliding_window=32),
    "phi": _config("PhiConfig", partial_rotary_factor=0.5),
    "gpt-neox": _config("GPTNeoXConfig", rotary_pct=0.25),
    "gpt-bigcode": _config("GPTBigCodeConfig", multi_query=True, num_key_value_heads=1),
    "gpt2": _config("GPT2Config"),
    "mixtral": _config("MixtralConfig", num_local_experts=4, sliding_window=None),
    "qwen2-moe": _config(
        "Qwen2MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
    ),
    "qwen3-moe": _config(
        "Qwen3MoeConfig",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
    ),
    "phimoe": _config("PhimoeConfig", num_local_experts=4, sliding_window=None),
    "stablelm": _config("StableLmConfig"),
    "cohere": _config("CohereConfig", logit_scale=0.25),
    "cohere2": _config("Cohere2Config", sliding_window=8, num_hidden_layers=4),
    "olmo2": _config("Olmo2Config"),
    "starcoder2": _config("Starcoder2Config", sliding_window=16),
    "smollm3": _config("SmolLM3Config", num_hidden_layers=4),
    "granite": _config(
        "GraniteConfig", logits_scaling=3.0, attention_multiplier=0.2, residual_multiplier=0.5
    ),
    "glm4": _config("Glm4Config", head_dim=16),
    "gpt-oss": _config(
        "GptOssConfig",
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
"""Families that tierkv serves, by a short name."""

REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": _config("MambaConfig"),
    "rwkv": _config("RwkvConfig"),
    "jamba": _config("JambaConfig"),
    "qwen3-next": _config("Qwen3NextConfig"),
    "t5": _config("T5Config"),
    "bloom": _config("BloomConfig"),
    "mpt": _config("MptConfig"),
    "falcon-alibi": _config("FalconConfig", alibi=True),
}
"""Families that it must refuse."""


def build_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The fp32 model of a config, every weight random (norms and biases too)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, STD)
                else:
                    weight.add_(torch.randn_like(weight) * 0.05)
    model.generation_config.eos_token_id = config.eos_token_id
    return model.eval()


def save_model(name: str, directory: Path, seed: int = 0, **values: Any) -> Path:
    """Write a family's tiny model as a Hugging Face directory (no tokenizer) and return it.

    Args:
        name: a key of `FAMILIES`.
        directory: where to write; made if it is not there.
        seed: of the weights.
        values: config fields to change.
    """
    config = FAMILIES[name]()
    for key, value in values.items():
        setattr(config, key, value)
    build_model(config, seed).save_pretrained(directory)
    return directory


def save_config(name: str, directory: Path) -> Path:
    """Write only the config of a refused family."""
    REFUSED[name]().save_pretrained(directory)
    return directory
