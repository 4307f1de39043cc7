"""How much of a GPU is left for KV, and what is said when that is nothing."""

from __future__ import annotations

import pytest
import torch

from tierkv.cache.layout import KVLayout
from tierkv.errors import ConfigError
from tierkv.model import memory
from tierkv.model.memory import DeviceMemory

GIB = 2**30
MEMORY = DeviceMemory(total=80 * GIB, used=17 * GIB, activations=2 * GIB, logits=GIB)


def test_room_is_what_the_share_leaves() -> None:
    assert MEMORY.room(0.9, 1) == int(80 * GIB * 0.9) - 20 * GIB
    assert MEMORY.room(1.0, 60 * GIB) == 60 * GIB


def test_what_would_fit_is_named_and_fits() -> None:
    """The smallest share in whole hundredths; none where the whole device does not do."""
    with pytest.raises(ConfigError, match=r"give at least 0\.32, lower") as caught:
        MEMORY.room(0.2, 5 * GIB)
    assert MEMORY.room(0.32, 5 * GIB) >= 5 * GIB
    assert "max_num_seqs" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        MEMORY.room(1.0, 61 * GIB)
    assert "at least" not in str(caught.value)


class NoRoom:
    """A model whose step is too large for its GPU."""

    device = torch.device("cuda", 0)
    max_model_len = 100
    vocab_size = 10


def test_a_step_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "_peak", overflow)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB // 4, 8 * GIB))
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="bfloat16")
    words = r"max_num_batched_tokens=4096.*cuda:0 has 8\.00 GiB, 0\.25 GiB of them free"
    with pytest.raises(ConfigError, match=words):
        memory.measure_memory(NoRoom(), layout, 4096, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(("utilization", "block"), [(0.25, 1), (0.2, 1), (0.3, 5 * GIB)])
def test_no_room_is_refused_with_the_numbers(utilization: float, block: int) -> None:
    with pytest.raises(ConfigError) as caught:
        MEMORY.room(utilization, block)
    message = str(caught.value)
    for part in ("gpu_memory_utilization", str(utilization), "80.00 GiB", "17.00 GiB in use"):
        assert part in message
    assert "2.00 GiB of activations" in message and "max_num_batched_tokens" in message
