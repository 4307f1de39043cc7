"""Shapes, bytes and windows of layouts made from configs, objects and plain dicts alike."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tierkv.cache.layout import ALIGNMENT, DTYPE_BITS, KVLayout, layer_windows
from tierkv.errors import ConfigError, UnsupportedModelError

LLAMA_3_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
}
OPT_6_7B = {
    "model_type": "opt",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
}


def test_llama_70b_takes_320_kib_per_token() -> None:
    layout = KVLayout.from_config(LLAMA_3_70B, 16, "bfloat16")
    assert layout.bytes_per_token == 320 * 1024
    assert layout.block_bytes == 16 * 320 * 1024
    assert layout.block_shape == (80, 2, 8, 16, 128)


def test_multi_head_attention_keeps_all_heads() -> None:
    layout = KVLayout.from_config(OPT_6_7B, 16, "float16")
    assert (layout.num_kv_heads, layout.head_dim) == (32, 128)
    assert layout.bytes_per_token * 4096 * 16 == 32 << 30


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({"model_type": "gpt_bigcode", "multi_query": True}, 1),
        ({"model_type": "gpt_bigcode", "multi_query": False}, 8),
        ({"model_type": "falcon"}, 1),
        ({"model_type": "falcon", "multi_query": False}, 8),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"model_type": "llama", "num_key_value_heads": 1}, 1),
    ],
)
def test_multi_query_models_keep_one_head(fields: dict[str, object], heads: int) -> None:
    config = {"n_layer": 2, "n_head": 8, "n_embd": 64, **fields}
    assert KVLayout.from_config(config, 16, "float32").num_kv_heads == heads


def test_explicit_head_dim_and_nested_text_config() -> None:
    text = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 640, "head_dim": 256}
    nested = {"model_type": "gemma3", "text_config": {**text, "num_key_value_heads": 4}}
    layout = KVLayout.from_config(nested, 8, "bfloat16")
    assert layout.block_shape == (2, 2, 4, 8, 256)
    as_object = SimpleNamespace(text_config=SimpleNamespace(**nested["text_config"]))  # type: ignore[arg-type]
    assert KVLayout.from_config(as_object, 8, "bfloat16") == layout


def test_slots_are_padded_and_blocks_are_not() -> None:
    layout = KVLayout(3, 1, 5, 1, "float16")
    assert layout.block_bytes == 3 * 2 * 5 * 2
    assert layout.slot_bytes == ALIGNMENT
    exact = KVLayout(1, 1, 128, 16, "float16")
    assert exact.block_bytes == exact.slot_bytes == 2 * ALIGNMENT


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_layers_tile_a_block_without_gap_or_overlap(dtype: str) -> None:
    layout = KVLayout(4, 2, 8, 16, dtype)
    end = 0
    for layer in range(4):
        place = layout.place(layer)
        assert (place.group, place.offset_bytes) == (0, end)
        keys = 2 * 16 * 8 * DTYPE_BITS[dtype] // 8
        assert place.key_shape == place.value_shape == (2, 16, 8)
        end += 2 * keys
    assert end == layout.block_bytes
    with pytest.raises(IndexError):
        layout.place(4)


def test_fingerprint_tells_readable_bytes_from_others() -> None:
    base = KVLayout(4, 2, 8, 16, "float16")
    others = [
        KVLayout(4, 2, 8, 16, "bfloat16"),
        KVLayout(4, 2, 8, 32, "float16"),
        KVLayout(4, 4, 8, 16, "float16"),
        KVLayout(5, 2, 8, 16, "float16"),
        KVLayout(4, 2, 8, 16, "float16", shard="1/2"),
    ]
    assert len({layout.fingerprint for layout in [base, *others]}) == 6
    windowed = KVLayout(4, 2, 8, 16, "float16", windows=(8,) * 4)
    assert windowed.fingerprint == base.fingerprint


def test_wrong_values_name_themselves() -> None:
    with pytest.raises(ConfigError, match="dtype='float64'"):
        KVLayout(1, 1, 8, 16, "float64")
    with pytest.raises(ConfigError, match="num_layers=0"):
        KVLayout(0, 1, 8, 16, "float16")
    with pytest.raises(ConfigError, match="windows"):
        KVLayout(2, 1, 8, 16, "float16", windows=(8,))
    with pytest.raises(UnsupportedModelError, match=r"mamba.*num_attention_heads"):
        KVLayout.from_config({"model_type": "mamba", "num_hidden_layers": 2}, 16, "float16")


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None,) * 6),
        ({"model_type": "mistral", "sliding_window": 8}, (8,) * 6),
        ({"sliding_window": 8, "use_sliding_window": False}, (None,) * 6),
        ({"sliding_window": 8, "max_window_layers": 2}, (None,) * 6),
        (
            {"sliding_window": 8, "max_window_layers": 4, "use_sliding_window": True},
            (None, None, None, None, 8, 8),
        ),
        ({"model_type": "gemma2", "sliding_window": 8}, (8, None) * 3),
        ({"sliding_window": 8, "sliding_window_pattern": 3}, (8, 8, None) * 2),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 3},
            (None, 8) * 3,
        ),
    ],
)
def test_windows_per_layer(fields: dict[str, object], windows: tuple[int | None, ...]) -> None:
    assert layer_windows({"num_hidden_layers": 6, **fields}) == windows


def test_common_window_needs_every_layer() -> None:
    assert KVLayout(2, 1, 8, 16, "float16").common_window is None
    assert KVLayout(2, 1, 8, 16, "float16", windows=(8, None)).common_window is None
    assert KVLayout(2, 1, 8, 16, "float16", windows=(8, 24)).common_window == 24


def test_layers_without_paged_attention_are_refused() -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        layer_windows(config)


def test_blocks_for_rounds_up() -> None:
    layout = KVLayout(1, 1, 8, 16, "float16")
    assert [layout.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_no_torch() -> None:
    code = "import sys, tierkv.cache.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
