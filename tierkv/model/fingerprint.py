"""A digest that changes when anything that shapes a model's KV does."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from tierkv.model.shard import whole_weight

_LANES = 512
_IGNORED = frozenset({"_name_or_path", "name_or_path", "transformers_version", "torch_dtype"})


def model_fingerprint(model: nn.Module, config: Any, variant: str) -> bytes:
    """16 bytes over the config (rope, attention, quantisation), a variant and every weight.

    Weights count by content, not by file, so the same model has the same fingerprint wherever its
    files lie, whatever device it runs on and however many ranks share it. Each is read once, at
    memory speed.

    Args:
        model: with its weights as they were loaded.
        config: its Hugging Face config.
        variant: what else was chosen when loading: dtype, positions.
    """
    digest = hashlib.blake2b(b"tierkv model 1|" + variant.encode(), digest_size=16)
    digest.update(json.dumps(_plain(config.to_dict()), sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"|{name}|{weight.dtype}|{tuple(weight.shape)}|".encode())
        digest.update(_content(whole_weight(weight)))
    return digest.digest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without names, versions and defaults that say nothing about the computation."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _IGNORED
    }


def _content(weight: Tensor) -> bytes:
    """Sums of the weight's bits in 512 interleaved lanes, modulo 2^64, and the rest as it is."""
    flat = weight.detach().contiguous().flatten()
    if flat.data_ptr() % 8 or flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = data.numel() // (8 * _LANES) * (8 * _LANES)
    rest = bytes(data[whole:].cpu().tolist())
    if not whole:
        return rest
    words = data[:whole].view(torch.int64).view(-1, _LANES)
    return bytes(words.sum(0).cpu().view(torch.uint8).tolist()) + rest
