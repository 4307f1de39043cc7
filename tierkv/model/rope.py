"""Rotary embeddings whose frequencies depend on the length of the longest sequence in a batch.

transformers picks `longrope`'s short or long factors anew at every forward. In a packed batch one
long sequence would turn the keys of all others, and keys that were cached under the other factors
would be wrong. So the choice is made once: short factors up to the original length, or long factors
for every sequence when the engine is asked for more (as vLLM does).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tierkv.errors import ConfigError
from tierkv.model import facts

logger = logging.getLogger(__name__)

_FIXED = "longrope, long factors"
_SHORT = "longrope, short factors"


def fix_length(model: nn.Module, config: Any, wanted: int | None) -> int:
    """Settle on one set of frequencies and return the longest context they allow.

    Args:
        model: its rotary modules may be changed.
        config: the model's Hugging Face config.
        wanted: `max_model_len` as the user gave it.

    Raises:
        ConfigError: the model has long factors that this cannot fix.
    """
    length = facts.max_positions(config)
    if facts.rope_kind(config) != "longrope":
        return length
    modules: list[Any] = [m for m in model.modules() if getattr(m, "rope_type", None) == "longrope"]
    if wanted is None or wanted <= length:
        for module in modules:  # or every forward would ask the device for the longest position
            module.rope_type = _SHORT
        return length
    if not modules or not all(_fix_long(module, length) for module in modules):
        raise ConfigError("max_model_len", wanted, f"beyond {length} its rotary factors vary")
    logger.warning("long rotary factors hold for every sequence, short ones too")
    return int(facts.text_config(config).max_position_embeddings)


def _fix_long(module: Any, original: int) -> bool:
    """Write the long factors into the module, which no longer looks like one that switches.

    False if that does not settle its rotation: some modules make their frequencies anew at every
    forward, or scale by the longest position (PhiMoE's do both).
    """
    make = ROPE_INIT_FUNCTIONS["longrope"]
    frequencies, _ = make(module.config, module.inv_freq.device, seq_len=original + 1)
    module.rope_type = _FIXED
    with torch.no_grad():
        still = module.inv_freq.zero_()
        near, far = (
            module(still[None, None], position_ids=still.new_tensor([[1, last]], dtype=torch.int64))
            for last in (2, original + 1)
        )
        is_settled = torch.equal(near[0], far[0]) and not near[1].any() and not far[1].any()
        module.inv_freq.copy_(frequencies)
    return is_settled
