"""A model's weights over several ranks, as transformers' own plan for its architecture says.

The plan (`base_model_tp_plan`) names the linear layers that are cut along their outputs or inputs;
transformers loads a rank's part only and adds up, or puts together, what the ranks compute. So an
attention layer sees its rank's heads, and the KV cache of a rank holds its heads' keys and values.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tierkv.errors import ConfigError, UnsupportedModelError

OPTION = "tensor_parallel_size"


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model this process has: `rank` of `size`, from 0."""

    rank: int = 0
    size: int = 1

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def __str__(self) -> str:
        return f"{self.rank}/{self.size}"


WHOLE = Shard()


def check_package(size: int) -> None:
    """Raise ConfigError unless what transformers needs for sharded loading is installed."""
    if importlib.util.find_spec("accelerate") is None:
        fix = "transformers loads sharded weights with `accelerate`: pip install 'tierkv[tp]'"
        raise ConfigError(OPTION, size, fix)


def check_shardable(config: Any, shard: Shard) -> None:
    """Refuse a model that cannot be cut into `shard.size` equal parts, from its config alone.

    Raises:
        UnsupportedModelError: it has no plan; ConfigError: its heads do not divide.
    """
    if shard.is_whole:
        return
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None) or {}
    if not any("layers" in name for name in plan):
        kind = getattr(text, "model_type", "?")
        reason = f"transformers has no tensor-parallel plan for its layers; use {OPTION}=1"
        raise UnsupportedModelError("model", kind, reason)
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    for count, what in ((num_kv_heads, "key/value heads"), (num_heads, "attention heads")):
        if count % shard.size:
            fix = f"the model's {count} {what} do not divide by it; choose a divisor of {count}"
            raise ConfigError(OPTION, shard.size, fix)


def sharded(shard: Shard) -> dict[str, Any]:
    """Arguments of `from_pretrained` for this rank's part, once the ranks have found each other."""
    if shard.is_whole:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=shard.size)}


def is_shared(weight: Tensor) -> bool:
    """Whether this rank has a part of the weight only."""
    return hasattr(weight, "full_tensor")


def whole_weight(weight: Tensor) -> Tensor:
    """The weight; of one that ranks share, all of it, so all must ask at the same time."""
    if not is_shared(weight):
        return weight
    shared: Any = weight
    (placement,) = shared.placements
    num_parts, size = getattr(placement, "split_factor", 1), shared.device_mesh.size()
    if num_parts == 1 or shared.shape[placement.dim] % (num_parts * size):
        whole: Tensor = shared.full_tensor()
        return whole
    return _interleaved(shared, placement.dim, num_parts, size)


def _interleaved(shared: Any, dim: int, num_parts: int, size: int) -> Tensor:
    """A weight of several parts (gate and up projections in one), each cut among the ranks.

    `full_tensor` of torch 2.11 refuses such a placement.
    """
    local: Tensor = shared.to_local().contiguous()
    found = [torch.empty_like(local) for _ in range(size)]
    torch.distributed.all_gather(found, local, group=shared.device_mesh.get_group())
    pieces = [of_rank.chunk(num_parts, dim) for of_rank in found]
    return torch.cat([piece[part] for part in range(num_parts) for piece in pieces], dim)


@contextmanager
def rank_in_environment(shard: Shard) -> Iterator[None]:
    """`RANK`, `LOCAL_RANK` and `WORLD_SIZE`, which transformers reads, for a while."""
    names = {"RANK": shard.rank, "LOCAL_RANK": shard.rank, "WORLD_SIZE": shard.size}
    before = {name: os.environ.get(name) for name in names}
    if not shard.is_whole:
        os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
