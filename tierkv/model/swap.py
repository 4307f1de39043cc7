"""Small modules between the products, replaced by one kernel each.

RMS norms and gated MLPs are half a dozen operations in transformers' code, which cost more for
their calls, and on a GPU for their launches, than for their arithmetic. A module is a candidate by
its outward form; what it computes is observed: it runs on random input, and is replaced only if the
kernel's results are the same but for rare last bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import deprecation

from tierkv.kernels import ops
from tierkv.model.fuse import FusedLinear, is_watched

_Function = Callable[..., Any]

_RENAMER = deprecation.__file__
_ROTARY = "apply_rotary_pos_emb"
_MLP_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_SCALES = (1.0, 1e-3, 50.0)
"""Sizes of the random inputs: ordinary, so small that epsilon counts, and saturating."""

_ROWS = 8
_MIN_EQUAL = 0.98
"""Share of elements that must be equal, last bit included; other orders of rounding get 0.8."""


class RmsNorm(nn.Module):
    """Stand-in for an RMS norm of transformers; `weight` is the original's."""

    def __init__(self, norm: nn.Module, eps: float, scale: Tensor, round_first: bool) -> None:
        super().__init__()
        self.weight = norm.weight
        self._options = (scale, eps, round_first)

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        scale, eps, round_first = self._options
        return ops.rms_norm(x, scale, eps, round_first=round_first)


class GatedMlp(nn.Module):
    """Stand-in for an MLP whose gate and up projections are fused."""

    def __init__(self, gate_up: nn.Module, down_proj: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        result: Tensor = self.down_proj(ops.act_and_mul(self.gate_up(x), self.activation))
        return result


@torch.inference_mode()
def swap_modules(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace norms and MLPs in place wherever that is safe; returns how many.

    Call it after `fuse_projections`: only MLPs whose projections were fused are replaced.
    """
    found: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child not in found:
                try:
                    found[child] = _norm(child, dtype) or _mlp(child, dtype)
                except Exception:  # foreign code may fail in any way; then it is no candidate
                    found[child] = None
            if (new := found[child]) is not None:
                setattr(parent, name, new)
    return sum(new is not None for new in found.values())


def _norm(module: nn.Module, dtype: torch.dtype) -> RmsNorm | None:
    """The kernel's form of a norm, if it is one."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype is not dtype:
        return None
    if len(list(module.parameters())) != 1 or module._modules or not _is_simple(module):
        return None
    x = _random_rows(weight.numel(), weight)
    wanted = module(x)
    wide = weight.detach().float()
    choices = [
        RmsNorm(module, eps, scale, round_first)
        for scale in (wide, 1.0 + wide)
        for round_first in (True, False)
    ]
    return max(
        (choice for choice in choices if _agree(choice(x), wanted)),
        key=lambda choice: _share_equal(choice(x), wanted),
        default=None,
    )


def _mlp(module: nn.Module, dtype: torch.dtype) -> GatedMlp | None:
    """The kernel's form of a gated MLP, if it is one."""
    if set(module._modules) != _MLP_CHILDREN or module._parameters:
        return None
    gate, up, down = (module._modules[name] for name in ("gate_proj", "up_proj", "down_proj"))
    if not (isinstance(gate, FusedLinear) and isinstance(up, FusedLinear) and down):
        return None
    group = gate.group
    if up.group is not group or (gate.index, up.index) != (0, 1) or len(set(group.sizes)) != 1:
        return None
    if not _is_simple(module) or any(map(is_watched, (down, gate, up, group, group.linear))):
        return None
    x = _random_rows(group.linear.in_features, group.linear.weight)
    hidden, wanted = _observe(module, down, x)
    if len(hidden) != 1 or not torch.equal(down(hidden[0]), wanted):
        return None
    joint = group.linear(x)
    for activation in ops.ACTIVATIONS:
        if _agree(ops.act_and_mul(joint, activation), hidden[0]):
            return GatedMlp(group.linear, down, activation)
    return None


def _observe(module: nn.Module, inner: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What reaches `inner` while the module runs, and the module's result."""
    seen: list[Tensor] = []
    handle = inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        return seen, module(x)
    finally:
        handle.remove()


def _is_simple(module: nn.Module) -> bool:
    """It takes one input, is set to inference, and nothing watches its calls."""
    num_inputs = len(inspect.signature(module.forward).parameters)
    return num_inputs == 1 and not module.training and not is_watched(module)


def _random_rows(dim: int, like: Tensor) -> Tensor:
    """`[1, rows, dim]` of all sizes, the same every time; of the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(len(_SCALES), _ROWS, dim, generator=generator)
    return (rows * torch.tensor(_SCALES)[:, None, None]).flatten(0, 1).unsqueeze(0).to(like)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    """Are the results the same but for rare last bits?"""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    limit = 2 * torch.finfo(wanted.dtype).eps * wanted.float().abs() + _noise(wanted)
    is_close = bool(((found.float() - wanted.float()).abs() <= limit).all())
    return is_close and _share_equal(found, wanted) >= _MIN_EQUAL


def _share_equal(found: Tensor, wanted: Tensor) -> float:
    difference = (found.float() - wanted.float()).abs()
    return float((difference <= _noise(wanted)).float().mean())


def _noise(wanted: Tensor) -> Tensor:
    """Per row, what fp32 itself leaves open (1 + tanh(x) where x is far below zero)."""
    return 1e-6 * wanted.float().abs().amax(-1, keepdim=True)


@torch.inference_mode()
def swap_rotary(model: nn.Module, dtype: torch.dtype, device: torch.device) -> int:
    """Let attention layers turn queries and keys by the kernel; returns how many do.

    An attention layer calls the function `apply_rotary_pos_emb` of its own source file. Where that
    gives the kernel's results bit for bit, the layer's `forward` is bound once more, the same code
    with the kernel in the function's place. The class and the file stay as they are.
    """
    kernels: dict[tuple[_Function, int], _Function | None] = {}
    count = 0
    for module in model.modules():
        forward, head_dim = _plain_forward(module), getattr(module, "head_dim", None)
        plain = forward.__globals__.get(_ROTARY) if forward is not None else None
        if forward is None or plain is None or not isinstance(head_dim, int):
            continue
        if (plain, head_dim) not in kernels:
            kernels[plain, head_dim] = _rotary(plain, head_dim, dtype, device)
        if (kernel := kernels[plain, head_dim]) is not None:
            module.forward = _rebind(forward, {_ROTARY: kernel}, module)
            count += 1
    return count


def _plain_forward(module: nn.Module) -> FunctionType | None:
    """The forward of the module's class below wrappers that rename old arguments, if any."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        if forward.__code__.co_filename != _RENAMER:
            return None
        forward = forward.__wrapped__
    is_bound = "forward" in vars(module) or not isinstance(forward, FunctionType)
    return None if is_bound or _ROTARY not in forward.__code__.co_names else forward


def _rotary(
    plain: _Function, head_dim: int, dtype: torch.dtype, device: torch.device
) -> _Function | None:
    """The kernel behind the function's signature, if it computes the same."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        fits = q.shape[0] == 1 and cos.dim() == 3 and cos.shape[::2] == (1, q.shape[-1])
        if args or kwargs or not fits or cos.dtype is not q.dtype:
            return plain(q, k, cos, sin, *args, **kwargs)
        q, k = ops.rotate(q[0], k[0], cos[0], sin[0])
        return q.unsqueeze(0), k.unsqueeze(0)

    generator = torch.Generator().manual_seed(head_dim)
    shapes = (1, 4, 5, head_dim), (1, 2, 5, head_dim), (1, 5, head_dim), (1, 5, head_dim)
    rows = (torch.randn(shape, generator=generator) for shape in shapes)
    q, k, cos, sin = (x.to(device, dtype) for x in rows)
    try:
        wanted = plain(q, k, cos, sin)
        same = all(map(torch.equal, rotate(q, k, cos, sin), wanted))
    except (TypeError, ValueError, RuntimeError):
        return None
    return rotate if same else None


def _rebind(forward: FunctionType, names: dict[str, Any], module: nn.Module) -> MethodType:
    """The method with other values of some globals, bound to the module."""
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, **names},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(copy, module)
