"""Configs of well-known models, so that `tierkv plan` answers without a download.

Each entry holds the fields of the published `config.json` that the KV cache depends on, and the
exact number of parameters. `tests/cli/test_shapes.py` compares both with the model classes.
"""

from __future__ import annotations

from typing import Any

from tierkv.errors import ConfigError

Shape = dict[str, Any]


def _shape(
    model_type: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    context: int,
    parameters: int,
    **more: Any,
) -> Shape:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "num_parameters": parameters,
        "dtype": "bfloat16",
        **more,
    }


def _opt(layers: int, hidden: int, heads: int, parameters: int) -> Shape:
    return _shape("opt", layers, hidden, heads, heads, 2048, parameters, dtype="float16")


BUILT_IN: dict[str, Shape] = {
    "opt-125m": _opt(12, 768, 12, 125_239_296),
    "opt-1.3b": _opt(24, 2048, 32, 1_315_758_080),
    "opt-6.7b": _opt(32, 4096, 32, 6_658_473_984),
    "opt-13b": _opt(40, 5120, 40, 12_853_473_280),
    "opt-30b": _opt(48, 7168, 56, 29_974_540_288),
    "opt-66b": _opt(64, 9216, 72, 65_719_701_504),
    "llama-2-7b": _shape("llama", 32, 4096, 32, 32, 4096, 6_738_415_616),
    "llama-2-13b": _shape("llama", 40, 5120, 40, 40, 4096, 13_015_864_320),
    "llama-2-70b": _shape("llama", 80, 8192, 64, 8, 4096, 68_976_648_192),
    "llama-3-8b": _shape("llama", 32, 4096, 32, 8, 8192, 8_030_261_248),
    "llama-3-70b": _shape("llama", 80, 8192, 64, 8, 8192, 70_553_706_496),
    "llama-3.1-8b": _shape("llama", 32, 4096, 32, 8, 131_072, 8_030_261_248),
    "llama-3.1-70b": _shape("llama", 80, 8192, 64, 8, 131_072, 70_553_706_496),
    "llama-3.1-405b": _shape("llama", 126, 16_384, 128, 8, 131_072, 405_853_388_800),
    "llama-3.2-1b": _shape("llama", 16, 2048, 32, 8, 131_072, 1_235_814_400, head_dim=64),
    "llama-3.2-3b": _shape("llama", 28, 3072, 24, 8, 131_072, 3_212_749_824, head_dim=128),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 28, 4, 32_768, 7_615_616_512),
    "qwen2.5-32b": _shape("qwen2", 64, 5120, 40, 8, 32_768, 32_763_876_352),
    "qwen2.5-72b": _shape("qwen2", 80, 8192, 64, 8, 32_768, 72_706_203_648),
    "qwen3-0.6b": _shape("qwen3", 28, 1024, 16, 8, 40_960, 596_049_920, head_dim=128),
    "qwen3-4b": _shape("qwen3", 36, 2560, 32, 8, 40_960, 4_022_468_096, head_dim=128),
    "qwen3-8b": _shape("qwen3", 36, 4096, 32, 8, 40_960, 8_190_735_360, head_dim=128),
    "qwen3-14b": _shape("qwen3", 40, 5120, 40, 8, 40_960, 14_768_307_200, head_dim=128),
    "qwen3-32b": _shape("qwen3", 64, 5120, 64, 8, 40_960, 32_762_123_264, head_dim=128),
    "mistral-7b": _shape("mistral", 32, 4096, 32, 8, 32_768, 7_241_732_096, sliding_window=4096),
    "mixtral-8x7b": _shape("mixtral", 32, 4096, 32, 8, 32_768, 46_702_792_704),
    "gemma-2-9b": _shape(
        "gemma2", 42, 3584, 16, 8, 8192, 9_241_705_984, head_dim=256, sliding_window=4096
    ),
    "gemma-2-27b": _shape(
        "gemma2", 46, 4608, 32, 16, 8192, 27_227_128_320, head_dim=128, sliding_window=4096
    ),
    "phi-3-mini": _shape("phi3", 32, 3072, 32, 32, 4096, 3_821_079_552, sliding_window=2047),
    "falcon-7b": _shape("falcon", 32, 4544, 71, 1, 2048, 6_921_720_704, multi_query=True),
    "gpt-neox-20b": _shape("gpt_neox", 44, 6144, 64, 64, 2048, 20_554_567_680, dtype="float16"),
}


def built_in(name: str) -> Shape | None:
    """The shape of a well-known model, or None; case and an organisation prefix do not matter."""
    return BUILT_IN.get(name.rpartition("/")[2].lower())


def unknown_model(name: str) -> ConfigError:
    """The error for a name that is nothing `plan` can read."""
    fix = (
        "is neither a model directory, a config.json, a cached hub model, nor one of "
        + ", ".join(BUILT_IN)
    )
    return ConfigError("model", name, fix)
