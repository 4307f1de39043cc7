"""Copy states: one writer, one table."""

from __future__ import annotations

import pytest

from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState, Residency
from tierkv.errors import InvariantError
from tierkv.types import TierName

GPU = TierName.GPU


def test_a_slot_goes_through_its_states_and_comes_back() -> None:
    residency = Residency({GPU: 2})
    tier, block = residency.tiers[GPU], Block(b"a", 0)
    slot = residency.begin_fill(block, GPU)
    assert tier.counts[CopyState.FILLING] == 1 and not residency.is_ready(block, GPU)
    residency.commit_fill(block, GPU)
    assert residency.is_ready(block, GPU) and block.copies[GPU].slot == slot
    residency.drop(block, GPU)
    assert tier.counts[CopyState.EMPTY] == 2 and tier.num_empty == 2 and not block.copies


def test_illegal_moves_are_loud() -> None:
    residency = Residency({GPU: 1})
    block, other = Block(b"a", 0), Block(b"b", 0)
    residency.begin_fill(block, GPU)
    with pytest.raises(InvariantError, match="no slot"):
        residency.begin_fill(other, GPU)
    residency.commit_fill(block, GPU)
    with pytest.raises(InvariantError, match="READY"):
        residency.commit_fill(block, GPU)
