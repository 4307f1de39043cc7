"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

`torch.nn.functional.linear` on CPU hands oneDNN a plain row-major weight, which it reorders or
reads inefficiently on every call. Packed once, the few-row products of decode run 1.1 to 3 times
as fast (docs/decisions/0001-cpu-kernels.md); the results differ by rounding only.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor, nn

# The number of rows the layout is chosen for. Layouts chosen for 8 to 256 rows measure alike at
# 1 to 128 rows; without a hint fp32 loses a quarter at one row.
_ROWS_HINT = 32
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PackedLinear(nn.Module):
    """Inference-only stand-in for an `nn.Linear` on CPU, holding its weight in packed form.

    `weight` is that packed tensor: its dtype, shape and device are the original's and `to_dense`
    recovers the values, but it is opaque to other operations, which raise.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
        bias: `[out_features]` or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.training = False
        self._packed = pack_weight(linear.weight)

    @property
    def weight(self) -> Tensor:
        """The packed weight, `[out_features, in_features]`."""
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias` for x `[..., in_features]` of the weight's dtype."""
        if not x.numel():
            return x.new_empty((*x.shape[:-1], self.out_features))
        return _apply(x, self._packed, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self._packed.dtype}"
        )


@torch.no_grad()
def pack_weight(weight: Tensor) -> Tensor:
    """A packed copy of a `[out_features, in_features]` weight, as big as the weight."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
    return packed


def _apply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """The packed product."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def can_pack(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Does packing work, and pay, for weights of this dtype on this device?"""
    if torch.device(device).type != "cpu" or dtype not in _DTYPES:
        return False
    return platform.machine() in ("x86_64", "AMD64") and _packing_works(dtype)


@functools.cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Try a small product; oneDNN refuses the dtypes that the CPU has no instructions for."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = (torch.arange(32 * 64).view(32, 64) % 7).to(dtype)
    x = (torch.arange(3 * 64).view(3, 64) % 5).to(dtype)
    try:
        found = _apply(x, pack_weight(weight), None)
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(found.float(), x.float() @ weight.float().T, rtol=0.01)


@torch.no_grad()
def pack_linears(model: nn.Module) -> int:
    """Replace a model's linear layers by packed ones, in place; returns how many.

    Only modules of exact type `nn.Linear` without hooks are replaced, where `can_pack` holds. A
    plain weight is freed as soon as it is packed, unless something else (an embedding tied to the
    output layer) still uses it. The model can then no longer be trained, moved, saved or
    deep-copied.
    """
    places: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if type(child) is nn.Linear and _is_packable(child):
                places.setdefault(child, []).append((parent, name))
    count = len(places)
    while places:
        linear, users = places.popitem()
        packed = PackedLinear(linear)
        for parent, name in users:
            setattr(parent, name, packed)
        del linear  # its weight goes before the next one is packed
    return count


def _is_packable(linear: nn.Linear) -> bool:
    """Does packing suit this layer, and does nothing watch its calls?"""
    weight = linear.weight
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return not hooked and weight.numel() > 0 and can_pack(weight.device, weight.dtype)
