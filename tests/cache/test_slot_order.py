"""Which empty slot a block gets: neighbours in a tier move in one operation."""

from __future__ import annotations

import random

from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import Residency
from tierkv.types import TierName

NVME = TierName.NVME


def filled(residency: Residency, count: int) -> list[Block]:
    blocks = [Block(b"%d" % number, 0) for number in range(count)]
    for block in blocks:
        residency.begin_fill(block, NVME)
        residency.commit_fill(block, NVME)
    return blocks


def slots_of(blocks: list[Block]) -> list[int]:
    return [block.copies[NVME].slot for block in blocks]


def test_blocks_that_come_together_are_neighbours() -> None:
    residency = Residency({NVME: 100})
    assert slots_of(filled(residency, 60)) == list(range(60))


def test_the_lowest_empty_slots_go_first() -> None:
    residency = Residency({NVME: 100})
    blocks = filled(residency, 100)
    leaving = random.Random(0).sample(range(100), 40)
    for slot in leaving:
        residency.drop(blocks[slot], NVME)
    assert slots_of(filled(residency, 40)) == sorted(leaving)


def test_slots_that_are_taken_at_the_start_are_left_out() -> None:
    residency = Residency({NVME: 10})
    residency.reserve(NVME, {0, 3, 4, 9})
    assert slots_of(filled(residency, 6)) == [1, 2, 5, 6, 7, 8]
