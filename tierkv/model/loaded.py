"""A model ready to run, and what the engine must know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tierkv.cache.layout import KVLayout
from tierkv.model.shard import WHOLE, Shard
from tierkv.model.trace import LayerFacts


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run over a paged KV cache, and what the engine must know about it.

    Attributes:
        model: transformers' module on `device`, its attention tierkv's.
        config: its Hugging Face config.
        tokenizer_path: where the tokenizer is to be loaded from.
        device, dtype: of weights, activations and KV.
        layers: facts of every attention layer, in order.
        max_model_len: the longest context the config allows, rope scaling included.
        eos_token_ids: tokens that end a text; may be empty.
        vocab_size: columns of the logits.
        fingerprint: 16 bytes that identify weights and config; part of every block key, and the
            same on every rank.
        shard: which part of the model this is.
    """

    model: PreTrainedModel
    config: Any
    tokenizer_path: str
    device: torch.device
    dtype: torch.dtype
    layers: list[LayerFacts]
    max_model_len: int
    eos_token_ids: frozenset[int]
    vocab_size: int
    fingerprint: bytes
    shard: Shard = WHOLE

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, the sliding window in tokens, or None."""
        return tuple(layer.window for layer in self.layers)

    @property
    def passes_step(self) -> bool:
        """Keyword arguments given to the model reach every attention layer."""
        return all(layer.has_step for layer in self.layers)

    def layout(self, block_size: int) -> KVLayout:
        """The layout of this model's KV at a block size; of a shard, what this rank holds."""
        first = self.layers[0]
        return KVLayout(
            num_layers=len(self.layers),
            num_kv_heads=first.num_kv_heads,
            head_dim=first.key_dim,
            block_size=block_size,
            dtype=dtype_name(self.dtype),
            windows=self.windows,
            shard=str(self.shard),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
