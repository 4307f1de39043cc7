"""Projections of the same input as one matrix product.

Query, key and value (gate and up) projections read the same activations. As one product they pay
one kernel launch and one wait for all threads instead of three, which is a good part of a decode
step on a CPU. No layer's code changes: the first sibling that is called computes all, the others,
called with the same tensor, hand out their share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Shares:
    """Outputs that wait for their sibling; no Module, whose attributes are slow to set."""

    __slots__ = ("source", "parts", "num_waiting")

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.parts: list[Tensor | None] = []
        self.num_waiting = 0


class FusedGroup(nn.Module):
    """The joint linear layer of siblings.

    Attributes:
        linear: weights of all siblings, stacked; may be replaced by a packed layer.
    """

    def __init__(self, siblings: Sequence[nn.Linear]) -> None:
        super().__init__()
        first = siblings[0]
        self.sizes = [sibling.out_features for sibling in siblings]
        with torch.device("meta"):
            self.linear = nn.Linear(first.in_features, sum(self.sizes), first.bias is not None)
        self.linear.weight = _stack([sibling.weight for sibling in siblings])
        if first.bias is not None:
            self.linear.bias = _stack([sibling.bias for sibling in siblings])
        self._shares = _Shares()

    @property
    def num_waiting(self) -> int:
        """Outputs computed for a sibling that has not been called yet."""
        return self._shares.num_waiting

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Sibling `index`'s output for x `[..., in_features]`, computed now or already there."""
        shares = self._shares
        part = shares.parts[index] if shares.source is x else None
        if part is None:
            part = self._compute(x, index)
        shares.parts[index] = None
        shares.num_waiting -= 1
        if not shares.num_waiting:
            shares.source = None  # activations must not outlive the layer
        return part

    def _compute(self, x: Tensor, index: int) -> Tensor:
        parts = self.linear(x).split_with_sizes(self.sizes, -1)
        shares = self._shares
        shares.source, shares.parts, shares.num_waiting = x, list(parts), len(parts)
        part: Tensor = parts[index]
        return part


class FusedLinear(nn.Module):
    """Stand-in for one of the siblings."""

    def __init__(self, group: FusedGroup, index: int) -> None:
        super().__init__()
        self.group = group
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """As the `nn.Linear` it replaces; the result may be a strided view."""
        return self.group.forward(x, self.index)


def fuse_projections(model: nn.Module) -> int:
    """Fuse sibling projections in place wherever that is safe; returns how many groups.

    Only plain `nn.Linear` siblings without hooks, of one dtype, all with or all without bias, are
    fused. Weights move into the group: there is one copy, as before.
    """
    groups = [found for parent in model.modules() for found in _fusable(parent)]
    for parent, names in groups:
        group = FusedGroup([getattr(parent, name) for name in names])
        for index, name in enumerate(names):
            setattr(parent, name, FusedLinear(group, index))
    return len(groups)


def _fusable(parent: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """The sets of siblings below `parent` that may become one product."""
    for names in _SIBLINGS:
        linears = [getattr(parent, name, None) for name in names]
        if all(type(linear) is nn.Linear and not is_watched(linear) for linear in linears):
            kinds = {(x.in_features, x.weight.dtype, x.bias is None) for x in linears if x}
            if len(kinds) == 1:
                yield parent, names


def is_watched(module: nn.Module) -> bool:
    """Something hangs on the module's calls; ranks that share its weights, for example."""
    is_wrapped = "forward" in vars(module)
    return bool(module._forward_hooks or module._forward_pre_hooks) or is_wrapped


def _stack(parts: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=False)
