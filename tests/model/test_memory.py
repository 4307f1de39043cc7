"""How much of a GPU is left for KV, and what is said when that is nothing."""

from __future__ import annotations

import pytest

from tierkv.errors import ConfigError
from tierkv.model.memory import DeviceMemory

GIB = 2**30
MEMORY = DeviceMemory(total=80 * GIB, used=17 * GIB, activations=2 * GIB, logits=GIB)


def test_room_is_what_the_share_leaves() -> None:
    assert MEMORY.room(0.9, 1) == int(80 * GIB * 0.9) - 20 * GIB
    assert MEMORY.room(1.0, 60 * GIB) == 60 * GIB


@pytest.mark.parametrize(("utilization", "block"), [(0.25, 1), (0.2, 1), (0.3, 5 * GIB)])
def test_no_room_is_refused_with_the_numbers(utilization: float, block: int) -> None:
    with pytest.raises(ConfigError) as caught:
        MEMORY.room(utilization, block)
    message = str(caught.value)
    for part in ("gpu_memory_utilization", str(utilization), "80.00 GiB", "17.00 GiB in use"):
        assert part in message
    assert "2.00 GiB of activations" in message and "max_num_batched_tokens" in message
