"""Weights in fp8, activations quantised row by row as they come: torchao's `PerRow` scheme.

Halves the memory of linear layers, and their products run on fp8 tensor cores. Embeddings and the
output layer stay as they are; so do experts that transformers keeps in one stacked tensor. KV and
activations between layers keep the model's dtype. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from tierkv.errors import ConfigError
from tierkv.model.device import FP8_CAPABILITY

logger = logging.getLogger(__name__)

_MULTIPLE = 16
"""What both sizes of a weight must be multiples of, for fp8 products."""


def check_quantization(name: str | None, device: torch.device) -> None:
    """Refuse a quantisation that the device cannot compute with.

    Raises:
        ConfigError: the device has no fp8, or torchao is not installed.
    """
    if name is None:
        return
    if device.type != "cuda":
        raise ConfigError("quantization", name, f"needs a GPU, the model runs on {device.type}")
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        wanted, has = (".".join(map(str, pair)) for pair in (FP8_CAPABILITY, found))
        fix = f"needs a GPU of compute capability {wanted}, this one has {has}: leave it out"
        raise ConfigError("quantization", name, fix)
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("quantization", name, "needs torchao: pip install 'tierkv[fp8]'")


def quantize(model: PreTrainedModel, name: str) -> int:
    """Replace the weights of linear layers, in place; returns how many layers.

    Args:
        model: on its device, in half precision, probed already.
        name: of the option; checked by `check_quantization`.

    Raises:
        ConfigError: the model has no layer that can be quantised, or torchao refuses.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    head = model.get_output_embeddings()
    names = {n for n, m in model.named_modules() if m is not head and is_quantizable(m)}
    if not names:
        fix = f"{type(model).__name__} has no linear layer whose sizes are multiples of {_MULTIPLE}"
        raise ConfigError("quantization", name, fix)
    scheme = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            quantize_(model, scheme, filter_fn=lambda _, path: path in names)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ConfigError("quantization", name, f"torchao cannot do it: {error}") from error
    torch.cuda.empty_cache()
    logger.info("%d linear layers have weights in %s", len(names), name)
    return len(names)


def is_quantizable(module: nn.Module) -> bool:
    """Whether it is a plain linear layer in half precision, of sizes that fp8 products take."""
    if type(module) is not nn.Linear:
        return False
    is_half = module.weight.dtype in (torch.bfloat16, torch.float16)
    return is_half and not any(size % _MULTIPLE for size in module.weight.shape)
