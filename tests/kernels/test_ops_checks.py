"""The wrappers name the argument that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tierkv.kernels import ops
from tierkv.kernels.metadata import build_metadata

KV = torch.zeros(4, 2, 2, 16, 32)
META = build_metadata([2], [20], [[0, 3]], 16)


def attention_arguments(**changes: Any) -> dict[str, Any]:
    """A valid call of `paged_attention`, changed."""
    return {"q": torch.zeros(2, 4, 32), "kv": KV, "meta": META, "scale": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 32, dtype=torch.float16)}, TypeError, "q has dtype"),
        ({"q": torch.zeros(3, 4, 32)}, ValueError, "q has shape"),
        ({"q": torch.zeros(2, 4, 16)}, ValueError, "q has shape"),
        ({"q": torch.zeros(2, 3, 32)}, ValueError, "q has 3 heads"),
        ({"q": torch.zeros(2, 128)}, ValueError, "q must be"),
        ({"q": torch.zeros(2, 32, 4).transpose(1, 2)}, ValueError, "q must be contiguous"),
        ({"kv": KV.double()}, TypeError, "kv has dtype"),
        ({"kv": KV.to("meta")}, ValueError, "kv is on meta"),
        ({"kv": torch.zeros(4, 3, 2, 16, 32)}, ValueError, "kv must be"),
        ({"kv": KV.transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "kv must be contig"),
        ({"kv": KV[:3]}, ValueError, "meta names block 3"),
        ({"kv": torch.zeros(4, 2, 2, 8, 32)}, ValueError, "meta has block_size"),
        ({"window": 0}, ValueError, "window"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks has shape"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks has dtype"),
        ({"out": torch.zeros(2, 4, 16)}, ValueError, "out has shape"),
        ({"out": torch.zeros(2, 4, 32).bfloat16()}, TypeError, "out has dtype"),
        ({"out": torch.zeros(4, 2, 32).transpose(0, 1)}, ValueError, "out must be contiguous"),
    ],
)
def test_paged_attention(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        ops.paged_attention(**attention_arguments(**changes))


def test_values_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="v has shape"):
        ops.write_kv(KV, torch.zeros(1, 2, 32), torch.zeros(1, 2, 16), torch.zeros(1).long())


@pytest.mark.parametrize(
    ("k", "slots", "error", "message"),
    [
        (torch.zeros(1, 3, 32), torch.zeros(1).long(), ValueError, "k has shape"),
        (torch.zeros(1, 2, 32).double(), torch.zeros(1).long(), TypeError, "k has dtype"),
        (torch.zeros(1, 2, 32), torch.zeros(1), TypeError, "slot_mapping has dtype"),
        (torch.zeros(1, 2, 32), torch.zeros(2).long(), ValueError, "slot_mapping has shape"),
    ],
)
def test_write_kv(k, slots, error, message) -> None:
    with pytest.raises(error, match=message):
        ops.write_kv(KV, k, k, slots)


def test_copy_blocks() -> None:
    pool, ids = torch.zeros(4, 1, 2, 2, 16, 32), torch.tensor([0])
    with pytest.raises(ValueError, match="pool must be contiguous"):
        ops.copy_blocks(pool[:, :, :, :1], ids, ids + 1, 1)
    with pytest.raises(ValueError, match="dst_ids has shape"):
        ops.copy_blocks(pool, ids, torch.tensor([1, 2]), 1)
    with pytest.raises(ValueError, match="num_tokens=17"):
        ops.copy_blocks(pool, ids, ids + 1, 17)


def test_merge_attention() -> None:
    out, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="lses has 0"):
        ops.merge_attention([], [])
    with pytest.raises(ValueError, match=r"lses\[1\]"):
        ops.merge_attention([out, out], [lse, lse[:1]])
    with pytest.raises(ValueError, match=r"outs\[1\]"):
        ops.merge_attention([out, out[:1]], [lse, lse])
    with pytest.raises(TypeError, match=r"lses\[0\]"):
        ops.merge_attention([out], [lse.double()])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 9).bfloat16()}, TypeError, "logits has dtype"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have rows"),
        ({"logits": torch.zeros(9, 2).T}, ValueError, "logits must be contiguous rows"),
        ({"logits": torch.zeros(9)}, ValueError, "logits must be contiguous rows"),
        ({"best": torch.zeros(3)}, ValueError, "best has shape"),
        ({"mass": torch.zeros(2).double()}, TypeError, "mass has dtype"),
        ({"is_open": torch.zeros(2)}, TypeError, "is_open has dtype"),
        ({"floor": torch.zeros(2, 1)}, ValueError, "floor has shape"),
        ({"floor": torch.zeros(4)[::2]}, ValueError, "floor must be contiguous"),
    ],
)
def test_widen_nuclei(changes, error, message) -> None:
    arguments = {name: torch.zeros(2) for name in ("best", "mass", "floor")}
    arguments |= {"logits": torch.zeros(2, 9), "is_open": torch.zeros(2).bool()}
    with pytest.raises(error, match=message):
        ops.widen_nuclei(**arguments | changes)
