"""Random-weight models of realistic shapes, made once and kept outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

logging.disable_progress_bar()

FIRST_TOKEN, LAST_TOKEN = 4, 8191
"""Tokens that every model here knows and that are not special."""


def _opt_125m() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=50272,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            ffn_dim=3072,
            max_position_embeddings=2048,
            word_embed_proj_dim=768,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _llama_150m() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=2048,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _tiny() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


_MAKERS = {"opt-125m": _opt_125m, "llama-150m": _llama_150m, "tiny": _tiny}
"""`llama-150m` has 81.8 M parameters in fact; `tiny` is what `--quick` runs."""


def cache_dir() -> Path:
    """`$TIERKV_BENCH_DIR`, else a folder in the user's cache."""
    given = os.environ.get("TIERKV_BENCH_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tierkv" / "benchmarks"


def model_dir(name: str) -> Path:
    """A Hugging Face directory (no tokenizer) of that shape; made on first use.

    Raises:
        ValueError: no such shape.
    """
    if name not in _MAKERS:
        raise ValueError(f"model {name!r} must be one of {', '.join(_MAKERS)}")
    target = cache_dir() / name
    if not (target / "config.json").exists():
        partial = target.with_name(f"{name}.{os.getpid()}.partial")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _MAKERS[name]().to(torch.bfloat16).save_pretrained(partial)
        if not target.exists():
            partial.rename(target)
    return target


def load_hf(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """transformers' own model, with its default (SDPA) attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=dtype)
    return model.eval()


def slot_bytes(name: str, block_size: int = 16) -> int:
    """Bytes that a bf16 block of one of these models takes in a lower tier: padded to 4 KiB."""
    config = AutoConfig.from_pretrained(model_dir(name))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * int(config.num_hidden_layers) * int(heads) * int(width) * block_size * 2
    return -(-size // 4096) * 4096
