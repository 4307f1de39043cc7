"""A first measurement of what computing takes on this machine, before any request."""

from __future__ import annotations

import time

import torch

from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool
from tierkv.engine.cost import MeasuredCost
from tierkv.model.loaded import LoadedModel
from tierkv.model.memory import prompt_of
from tierkv.model.runner import ModelRunner

_LENGTHS = {"cpu": (32, 160), "cuda": (512, 4096)}
"""On a GPU shorter prompts take as long as their launches."""


def measure_compute(loaded: LoadedModel, layout: KVLayout) -> MeasuredCost:
    """Time two prompts of different length: some hundred tokens on a CPU, thousands on a GPU.

    The cost of a pair of tokens is not measured but derived: attention does `4 * heads * head_dim`
    operations per layer and pair, the rest of the model 2 per parameter and token.
    """
    shorter, longer = _LENGTHS[loaded.device.type]
    long = min(longer, loaded.max_model_len)
    short = min(shorter, max(1, long // 2))
    runner = ModelRunner(loaded, GpuPool(layout, layout.blocks_for(long), loaded.device))
    short_s = min(_time(runner, short) for _ in range(2))
    long_s = min(_time(runner, long) for _ in range(2))
    per_token = max((long_s - short_s) / max(1, long - short), long_s / long / 4)
    heads = loaded.layers[0].num_heads * loaded.layers[0].key_dim * len(loaded.layers)
    heads *= loaded.shard.size
    parameters = sum(p.numel() for p in loaded.model.parameters())
    per_pair = per_token * 4 * heads / (2 * max(parameters, 1))
    return MeasuredCost(layout.block_bytes, per_token_s=per_token, per_pair_s=per_pair)


def _time(runner: ModelRunner, num_tokens: int) -> float:
    """Seconds of one forward over a prompt of zeros."""
    device = runner.pool.device
    inputs = prompt_of(num_tokens, 1, runner.pool.layout, device)
    synchronize(device)
    start = time.perf_counter()
    runner.forward(inputs)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
