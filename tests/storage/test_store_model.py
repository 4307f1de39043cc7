"""Any history of operations agrees with a dict, across reopening and damaged indexes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from store_blocks import cause, key_of, open_nvme, payload_of, read_back, write_of

from tierkv.storage.base import DONE, Cause
from tierkv.storage.index import remove_index

CAPACITY = 8
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Hundreds of stores are opened and synced."""
slots = st.integers(0, CAPACITY - 1)
numbers = st.integers(0, 5)


class StoreMachine(RuleBasedStateMachine):
    """`held`: slot -> (block's number, when it was written)."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(dir=MEMORY))
        self.store = open_nvme(self.path, CAPACITY)
        self.held: dict[int, tuple[int, int]] = {}
        self.time = 0

    @rule(blocks=st.dictionaries(slots, numbers, min_size=1))
    def write(self, blocks: dict[int, int]) -> None:
        writes = [write_of(slot, number) for slot, number in blocks.items()]
        assert self.store.write(writes) == [DONE] * len(writes)
        for slot, number in blocks.items():
            self.time += 1
            self.held[slot] = (number, self.time)

    @rule(chosen=st.lists(slots, unique=True))
    def erase(self, chosen: list[int]) -> None:
        assert self.store.erase(chosen) == [DONE] * len(chosen)
        gone = [self.held[slot] for slot in chosen if slot in self.held]
        for number, time in gone:
            older = [s for s, (n, t) in self.held.items() if n == number and t <= time]
            for slot in older:
                del self.held[slot]

    @rule(slot=slots, number=numbers)
    def read(self, slot: int, number: int) -> None:
        outcome, payload = read_back(self.store, slot, number)
        if self.held.get(slot, (None,))[0] == number:
            assert (outcome, payload) == (DONE, payload_of(number))
        else:
            assert cause(outcome) is Cause.NOT_FOUND

    @rule(chosen=st.lists(slots))
    def touch(self, chosen: list[int]) -> None:
        self.store.touch(chosen)

    @rule(fate=st.sampled_from(["close", "lose the index", "crash"]))
    def reopen(self, fate: str) -> None:
        if fate == "crash":  # as the files are now, without anything that closing writes
            path = Path(tempfile.mkdtemp(dir=MEMORY))
            shutil.copytree(self.path, path, dirs_exist_ok=True)
            self.teardown()
            self.path = path
        else:
            self.store.close()
        if fate == "lose the index":
            remove_index(self.path)
        self.store = open_nvme(self.path, CAPACITY)

    @invariant()
    def recover_tells_the_newest(self) -> None:
        newest: dict[int, int] = {}
        for slot, (number, _) in sorted(self.held.items(), key=lambda item: item[1][1]):
            newest[number] = slot
        expected = sorted((slot, key_of(number)) for number, slot in newest.items())
        assert [(block.slot, block.key) for block in self.store.recover()] == expected

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.path)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True
)
