"""A first measurement of what computing takes on this machine, before any request."""

from __future__ import annotations

import time

import torch

from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool
from tierkv.engine.cost import MeasuredCost
from tierkv.kernels.metadata import build_metadata
from tierkv.model.inputs import StepInputs
from tierkv.model.loaded import LoadedModel
from tierkv.model.runner import ModelRunner

_SHORT, _LONG = 32, 160


def measure_compute(loaded: LoadedModel, layout: KVLayout) -> MeasuredCost:
    """Time two prompts of different length; takes as long as computing some hundred tokens.

    The cost of a pair of tokens is not measured but derived: attention does `4 * heads * head_dim`
    operations per layer and pair, the rest of the model 2 per parameter and token.
    """
    long = min(_LONG, loaded.max_model_len)
    short = min(_SHORT, max(1, long // 2))
    runner = ModelRunner(loaded, GpuPool(layout, layout.blocks_for(long), loaded.device))
    short_s = min(_time(runner, short) for _ in range(2))
    long_s = min(_time(runner, long) for _ in range(2))
    per_token = max((long_s - short_s) / max(1, long - short), long_s / long / 4)
    heads = loaded.layers[0].num_heads * loaded.layers[0].key_dim * len(loaded.layers)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    per_pair = per_token * 4 * heads / (2 * max(parameters, 1))
    return MeasuredCost(layout.block_bytes, per_token_s=per_token, per_pair_s=per_pair)


def _time(runner: ModelRunner, num_tokens: int) -> float:
    """Seconds of one forward over a prompt of zeros."""
    layout, device = runner.pool.layout, runner.pool.device
    blocks = list(range(layout.blocks_for(num_tokens)))
    meta = build_metadata([num_tokens], [num_tokens], [blocks], layout.block_size, device=device)
    inputs = StepInputs(
        input_ids=torch.zeros(1, num_tokens, dtype=torch.int64, device=device),
        position_ids=meta.positions.unsqueeze(0),
        meta=meta,
        logit_rows=torch.tensor([num_tokens - 1], device=device),
    )
    start = time.perf_counter()
    runner.forward(inputs)
    return time.perf_counter() - start
