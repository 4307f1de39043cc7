"""What each attention layer of a loaded model really does, observed in one tiny forward pass.

A config only hints at it. Here every layer shows the shape of its keys, its mask, its soft-cap and
its sinks by calling an attention function that records and returns zeros. The masks are asked for
what they let through at far positions, so a window is the model's own, whatever its length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tierkv.errors import InvariantError, TierkvError, UnsupportedModelError

IMPLEMENTATION = "tierkv_trace"
_NUM_TOKENS = 4
_FAR = (1 << 20, (1 << 19) + 1234)


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One attention layer, as seen from its call.

    Attributes:
        index: its `layer_idx`.
        num_heads, num_kv_heads: of the query and of the keys.
        key_dim, value_dim: elements of one head's key and value.
        window: sliding window in tokens (the token itself included), or None.
        has_step: keyword arguments given to the model arrive at the layer.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    has_step: bool


@dataclass(slots=True)
class _Call:
    """What one call of the attention function showed."""

    module: nn.Module
    shapes: tuple[torch.Size, torch.Size, torch.Size]
    mask: Tensor | None
    kwargs: dict[str, Any]


class _Trace:
    """Everything one tracing pass saw.

    Attributes:
        calls: of the attention function, in the order in which the layers ran.
        rules: address of a mask's storage -> the rule it was made from.
        masks: keeps those addresses in use.
    """

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.rules: dict[int, Callable[..., Any]] = {}
        self.masks: list[Tensor] = []


_trace: ContextVar[_Trace | None] = ContextVar("tierkv_trace", default=None)

# Keyword arguments of attention layers that need nothing from the attention function: either tierkv
# takes care of them or they are about something else.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "position_embeddings",
        "position_ids",
        "s_aux",
        "token_type_ids",
    }
)


def trace_layers(model: PreTrainedModel) -> list[LayerFacts]:
    """Facts of every attention layer, in layer order; leaves the attention implementation changed.

    Raises:
        UnsupportedModelError: the layers cannot be served from a paged cache, and why.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(name, "its forward takes no position_ids, so rows cannot be packed")
    model.set_attn_implementation(IMPLEMENTATION)
    tokens = torch.arange(1, _NUM_TOKENS + 1, device=model.device).unsqueeze(0)
    kwargs = {"tierkv_step": True} if takes_kwargs(model) else {}
    trace = _Trace()
    token = _trace.set(trace)
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False, **kwargs)
    except TierkvError:
        raise
    except Exception as error:  # foreign code may fail in any way; all of them mean the same
        raise _refusal(name, f"its forward fails without a KV cache ({error!r})") from error
    finally:
        _trace.reset(token)
    if not trace.calls:
        raise _refusal(name, "its attention layers bypass transformers' AttentionInterface")
    facts = [_facts(name, call, trace.rules) for call in trace.calls]
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return _check_layers(name, sorted(facts, key=lambda fact: fact.index), num_layers)


def takes_kwargs(model: nn.Module) -> bool:
    """Whether the model's forward accepts arbitrary keyword arguments."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of the tracing pass."""
    trace = _trace.get()
    if trace is None:
        raise InvariantError("a tracing attention layer ran outside a trace")
    shapes = (query.shape, key.shape, value.shape)
    trace.calls.append(_Call(module, shapes, attention_mask, kwargs))
    batch, heads, rows, _ = query.shape
    return query.new_zeros(batch, rows, heads, value.shape[-1]), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The mask of the tracing pass: its identity stands for the rule it was made from."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    trace = _trace.get()
    if trace is None:
        raise InvariantError("a tracing mask was made outside a trace")
    trace.rules[mask.data_ptr()] = mask_function
    trace.masks.append(mask)
    return mask


def _facts(name: str, call: _Call, rules: dict[int, Callable[..., Any]]) -> LayerFacts:
    """Facts of one layer, or the reason why it cannot be served."""
    index = getattr(call.module, "layer_idx", None)
    if not isinstance(index, int):
        raise _refusal(name, f"{type(call.module).__name__} does not say which layer it is")
    query, key, value = call.shapes
    rows = {shape[2] for shape in call.shapes}
    if rows != {_NUM_TOKENS} or query[0] != 1:
        raise _refusal(name, f"layer {index} attends over something else than its own tokens")
    _check_kwargs(name, index, call.kwargs)
    if call.kwargs.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        raise _refusal(name, f"layer {index} sees later tokens (bidirectional attention)")
    return LayerFacts(
        index=index,
        num_heads=query[1],
        num_kv_heads=key[1],
        key_dim=key[3],
        value_dim=value[3],
        window=_window(name, index, call.mask, rules),
        has_step=call.kwargs.get("tierkv_step") is not None,
    )


def _check_kwargs(name: str, index: int, kwargs: dict[str, Any]) -> None:
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and key not in _HARMLESS:
            raise _refusal(name, f"layer {index} gives its attention an unknown {key} tensor")


def _window(
    name: str, index: int, mask: Tensor | None, rules: dict[int, Callable[..., Any]]
) -> int | None:
    """How far back the layer's mask looks: all (None), or a fixed number of tokens."""
    rule = None if mask is None else rules.get(mask.data_ptr())
    if rule is None:
        raise _refusal(name, f"layer {index} builds its own attention mask (position bias?)")
    first, second = (_reach(name, index, rule, position) for position in _FAR)
    if (first, second) == tuple(position + 1 for position in _FAR):
        return None
    if first != second:
        raise _refusal(name, f"layer {index} sees neither everything nor a fixed window")
    return first


def _reach(name: str, index: int, rule: Callable[..., Any], position: int) -> int:
    """Keys visible from `position`, which must be an unbroken run that ends there."""
    keys = torch.arange(position + 2)
    zero = torch.zeros((), dtype=torch.int64)
    try:
        seen = torch.as_tensor(rule(zero, zero, torch.tensor(position), keys)).expand(keys.shape)
    except (IndexError, RuntimeError) as error:
        reason = f"layer {index}'s attention mask depends on more than positions ({error})"
        raise _refusal(name, reason) from None
    visible = seen.nonzero().flatten()
    count = int(visible.numel())
    if not count or visible[-1] != position or visible[0] != position - count + 1:
        raise _refusal(name, f"layer {index}'s attention mask is not causal over a run of tokens")
    return count


def _check_layers(name: str, facts: list[LayerFacts], num_layers: int) -> list[LayerFacts]:
    """Every layer once, and all of one shape: what one pool can hold."""
    indices = [fact.index for fact in facts]
    if indices != list(range(num_layers)):
        reason = f"its {num_layers} layers call for attention as {indices}, not each once"
        raise _refusal(name, reason)
    shapes = {(fact.num_kv_heads, fact.key_dim, fact.value_dim) for fact in facts}
    if len(shapes) > 1:
        raise _refusal(name, f"its layers' KV differ in (heads, key, value) size: {sorted(shapes)}")
    ((_, key_dim, value_dim),) = shapes
    if key_dim != value_dim:
        raise _refusal(name, f"its keys have {key_dim} elements per head, its values {value_dim}")
    return facts


def _refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError("model", name, reason)


AttentionInterface.register(IMPLEMENTATION, _record)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
