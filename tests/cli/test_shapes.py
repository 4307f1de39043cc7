"""The table of known models agrees with the model classes of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tierkv.cache.layout import KVLayout
from tierkv.cli.shapes import BUILT_IN

# What the number of parameters depends on besides the shape: MLP width, vocabulary, tied
# embeddings; from the published config files.
PUBLISHED = {
    "llama-2-7b": (11008, 32000, False),
    "llama-2-13b": (13824, 32000, False),
    "llama-2-70b": (28672, 32000, False),
    "llama-3-8b": (14336, 128256, False),
    "llama-3-70b": (28672, 128256, False),
    "llama-3.1-8b": (14336, 128256, False),
    "llama-3.1-70b": (28672, 128256, False),
    "llama-3.1-405b": (53248, 128256, False),
    "llama-3.2-1b": (8192, 128256, True),
    "llama-3.2-3b": (8192, 128256, True),
    "qwen2.5-7b": (18944, 152064, False),
    "qwen2.5-32b": (27648, 152064, False),
    "qwen2.5-72b": (29568, 152064, False),
    "qwen3-0.6b": (3072, 151936, True),
    "qwen3-4b": (9728, 151936, True),
    "qwen3-8b": (12288, 151936, False),
    "qwen3-14b": (17408, 151936, False),
    "qwen3-32b": (25600, 151936, False),
    "mistral-7b": (14336, 32000, False),
    "mixtral-8x7b": (14336, 32000, False),
    "gemma-2-9b": (14336, 256000, True),
    "gemma-2-27b": (36864, 256000, True),
    "phi-3-mini": (8192, 32064, False),
    "gpt-neox-20b": (24576, 50432, False),
    "falcon-7b": (18176, 65024, True),
}
EXTRA = {
    "falcon": {"bias": False, "parallel_attn": True, "alibi": False},
    "phi3": {"pad_token_id": 0},
}
QUICK = ("opt-6.7b", "llama-3-8b", "falcon-7b")


def build_config(name: str) -> AutoConfig:
    shape = {**BUILT_IN[name]}
    for field in ("num_parameters", "dtype"):
        del shape[field]
    kind = shape.pop("model_type")
    if kind == "opt":
        hidden = shape["hidden_size"]
        shape |= {"vocab_size": 50272, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    else:
        width, vocab, is_tied = PUBLISHED[name]
        shape |= {"intermediate_size": width, "vocab_size": vocab, "tie_word_embeddings": is_tied}
    if kind == "falcon":
        del shape["num_key_value_heads"]
    return AutoConfig.for_model(kind, **shape, **EXTRA.get(kind, {}))


def check(name: str) -> None:
    shape, config = BUILT_IN[name], build_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape["num_parameters"]
    ours = KVLayout.from_config(shape, block_size=16, dtype="bfloat16")
    theirs = KVLayout.from_config(config, block_size=16, dtype="bfloat16")
    assert ours == theirs
    assert ours.windows == theirs.windows


@pytest.mark.parametrize("name", QUICK)
def test_common_models(name: str) -> None:
    check(name)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - set(QUICK)))
def test_all_other_models(name: str) -> None:
    check(name)
