"""Steps for Triton's kernels: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tierkv.kernels.metadata import AttentionMetadata
from tierkv.kernels.triton.attention import attention
from tierkv.kernels.triton.tiles import Device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def repair_the_interpreter() -> None:
    """Make it multiply bf16, of which it keeps the bits as integers and multiplies those, and turn
    a scalar into an index, which 3.6 cannot with a numpy of 2.5."""
    create_dot = interpreter.InterpreterBuilder.create_dot
    patch_attribute = interpreter._LangPatchScope.set_attr

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def set_attr(self: Any, owner: Any, name: str, value: Any) -> None:
        if name == "__index__":
            value = lambda scalar: scalar.handle.data.item()  # noqa: E731
        patch_attribute(self, owner, name, value)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._LangPatchScope.set_attr = set_attr


repair_the_interpreter()


def on_device(x: Tensor) -> Tensor:
    """The same view of the same memory, where the kernels run."""
    if DEVICE == "cpu":
        return x
    base = x if x._base is None else x._base
    return base.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def meta_on_device(meta: AttentionMetadata) -> AttentionMetadata:
    """The step's tensors where the kernels run."""
    names = "query_start context_lens key_start key_lens block_tables positions slot_mapping"
    moved = {name: getattr(meta, name).to(DEVICE) for name in names.split()}
    return replace(meta, **moved, plans={})


def attend(
    q: Tensor,
    kv: Tensor,
    meta: AttentionMetadata,
    *,
    num_sms: int = 1,
    is_partial: bool = False,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Launch over poisoned outputs and bring them back: out, and lse if partial.

    Args:
        num_sms: the more, the more parts contexts are cut into.
    """
    dtype = torch.float32 if is_partial else q.dtype
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=DEVICE)
    lse = torch.full(q.shape[:2], torch.nan, device=DEVICE) if is_partial else None
    sinks = None if sinks is None else sinks.to(DEVICE)
    attention(
        *(on_device(q), on_device(kv), meta_on_device(meta), out, lse, Device(num_sms, (9, 0))),
        sinks=sinks,
        **options,
    )
    return out.cpu(), None if lse is None else lse.cpu()
