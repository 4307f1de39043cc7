"""How much of a GPU is left for KV, found by computing the largest step once.

    room = total * utilization - used - activations - logits

used is all that is taken on the device while nothing runs, by other processes too, once libraries
and kernels are loaded; activations the peak of the largest step above that; logits what graphs and
the sampler hold for `max_num_seqs` rows (the buffer, and at most four tensors of its size while
tokens are chosen). Not yet run on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool
from tierkv.errors import ConfigError
from tierkv.kernels.metadata import build_metadata
from tierkv.model.device import free_memory, gib
from tierkv.model.inputs import StepInputs
from tierkv.model.loaded import LoadedModel
from tierkv.model.runner import ModelRunner

_LOGITS_COPIES = 5


@dataclass(slots=True, frozen=True)
class DeviceMemory:
    """Bytes of one GPU.

    Attributes:
        total: what it has.
        used: taken while nothing runs.
        activations: more, at the peak of the largest step.
        logits: more, for sampling.
    """

    total: int
    used: int
    activations: int
    logits: int

    def room(self, utilization: float, block_bytes: int) -> int:
        """Bytes for KV when so large a share of the device may be used.

        Raises:
            ConfigError: it does not hold one block, with the numbers.
        """
        need = self.used + self.activations + self.logits
        left = int(self.total * utilization) - need
        if left >= block_bytes:
            return left
        share = math.ceil(100 * (need + block_bytes) / self.total) / 100
        fix = (
            f"of {gib(self.total)}, {gib(self.used)} in use with the weights, "
            f"{gib(self.activations)} of activations and {gib(self.logits)} of logits leave no "
            f"block of KV ({block_bytes} bytes): "
            + (f"give at least {share:.2f}, " if share <= 1.0 else "")
            + "lower max_num_batched_tokens or max_num_seqs, or take a smaller model"
        )
        raise ConfigError("gpu_memory_utilization", utilization, fix)


def measure_memory(
    loaded: LoadedModel, layout: KVLayout, max_num_batched_tokens: int, max_num_seqs: int
) -> DeviceMemory:
    """Compute the largest step on the model's GPU, over a pool of its own.

    Raises:
        ConfigError: that step does not fit, with the numbers.
    """
    try:
        peak = _peak(loaded, layout, max_num_batched_tokens, max_num_seqs)
    except torch.OutOfMemoryError as error:
        found = free_memory(loaded.device)
        fix = f"a step of so many tokens does not fit beside the weights ({found}): ask for fewer"
        raise ConfigError("max_num_batched_tokens", max_num_batched_tokens, fix) from error
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(loaded.device)
    logits = _LOGITS_COPIES * 4 * max_num_seqs * loaded.vocab_size
    return DeviceMemory(total, total - free, peak, logits)


def _peak(
    loaded: LoadedModel, layout: KVLayout, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """Bytes that the largest step takes for a while."""
    device = loaded.device
    torch.cuda.empty_cache()
    num_tokens = min(max_num_batched_tokens, loaded.max_model_len)
    pool = GpuPool(layout, layout.blocks_for(num_tokens), device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ModelRunner(loaded, pool).forward(prompt_of(num_tokens, max_num_seqs, layout, device))
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def prompt_of(
    num_tokens: int, num_logits: int, layout: KVLayout, device: torch.device
) -> StepInputs:
    """One prompt of zeros in the first blocks of a pool, with logits of its last tokens."""
    blocks = list(range(layout.blocks_for(num_tokens)))
    meta = build_metadata([num_tokens], [num_tokens], [blocks], layout.block_size, device=device)
    return StepInputs(
        input_ids=torch.zeros(1, num_tokens, dtype=torch.int64, device=device),
        position_ids=meta.positions.unsqueeze(0),
        meta=meta,
        logit_rows=torch.arange(max(0, num_tokens - num_logits), num_tokens, device=device),
    )
