"""The attention function that transformers' layers call, over paged keys and values.

A step's geometry (`StepContext`) reaches it as the keyword argument `tierkv_step` wherever the
model hands its keyword arguments down to its attention layers. Some architectures do not; for them
the runner holds the step in `_current` during the forward pass. Which of the two a model needs is
found when it is loaded (`trace.trace_layers`), not guessed at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tierkv.cache.pools import GpuPool
from tierkv.errors import InvariantError
from tierkv.kernels.metadata import AttentionMetadata
from tierkv.kernels.ops import paged_attention, write_kv

IMPLEMENTATION = "tierkv"
"""Name under which transformers knows the function; it builds no mask for such a name."""


class StepContext:
    """What the attention layers of one forward pass share.

    Attributes:
        pool: the blocks.
        meta: rows, positions, block tables.
        windows: per layer, the sliding window in tokens or None.
    """

    __slots__ = ("pool", "meta", "windows")

    def __init__(
        self, pool: GpuPool, meta: AttentionMetadata, windows: Sequence[int | None]
    ) -> None:
        self.pool = pool
        self.meta = meta
        self.windows = windows


_current: ContextVar[StepContext | None] = ContextVar("tierkv_step", default=None)


@contextmanager
def current_step(step: StepContext) -> Iterator[None]:
    """Hold `step` for a model that does not hand its keyword arguments to its layers."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tierkv_step: StepContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Store the step's keys and values, then attend over everything the block tables reach.

    Args:
        module: the attention layer; its `layer_idx` picks the pool's layer.
        query: `[1, num_heads, num_tokens, head_dim]`, rotary embedding applied.
        key, value: `[1, num_kv_heads, num_tokens, head_dim]`.
        attention_mask: always None; causality and windows come from the step.
        scaling: factor on the scores; the layer's own, or `head_dim ** -0.5`.
        softcap: soft limit of the scores (Gemma 2).
        s_aux: `[num_heads]` sink logits (gpt-oss).
        tierkv_step: the step, unless it is held in the context.
        kwargs: whatever else the layer says; `trace_layers` has looked at it.

    Returns:
        `[1, num_tokens, num_heads, head_dim]`, and None for the weights.
    """
    step = tierkv_step if tierkv_step is not None else _current.get()
    if step is None:
        raise InvariantError("a tierkv attention layer ran outside a step")
    layer: int = module.layer_idx  # type: ignore[assignment]
    kv = step.pool.layer(layer)
    write_kv(kv, key[0].transpose(0, 1), value[0].transpose(0, 1), step.meta.slot_mapping)
    out = paged_attention(
        query[0].transpose(0, 1),
        kv,
        step.meta,
        scale=layer_scale(module, query, scaling),
        window=step.windows[layer],
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def layer_scale(module: nn.Module, query: Tensor, scaling: float | None) -> float:
    """The factor on the scores: what the layer passed, else its attribute, else the usual one."""
    if scaling is None:
        scaling = getattr(module, "scaling", None)
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


AttentionInterface.register(IMPLEMENTATION, attend)
