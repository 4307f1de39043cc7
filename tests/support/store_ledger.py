"""What a store may hold after it died at any moment: a model fed with a log of intents and answers.

A log line is `verb phase numbers...`: `W I slot number ...` before a write of blocks into slots,
`W A ...` once it was answered DONE; `E I slot ...` and `E A slot ...` for erasures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from store_blocks import cause, key_of, payload_of, read_back, write_of

from tierkv.storage.base import DONE, BlockStore, Cause, SlotRead
from tierkv.storage.io import aligned

Log = Callable[[str], object]


class Ledger:
    """Which blocks each slot may hold (None: nothing), and in which order they were written."""

    def __init__(self, capacity: int) -> None:
        self.allowed: dict[int, set[int | None]] = {slot: {None} for slot in range(capacity)}
        self._order: dict[int, int] = {}
        self._time = 0
        self._certain: dict[int, bool] = {}
        self._vague: set[int] = set()
        """Slots of which `check` found out what they hold: when that was written is not known."""

    def replay(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.note(line)

    def note(self, line: str) -> None:
        verb, phase, *words = line.split()
        numbers = list(map(int, words))
        if verb == "W":
            for slot, number in zip(numbers[::2], numbers[1::2], strict=True):
                self._write(slot, number, phase == "A")
        else:
            for slot in numbers:
                self._erase(slot, phase == "A")

    def _write(self, slot: int, number: int, is_done: bool) -> None:
        if is_done:
            self.allowed[slot] = {number}
            self._vague.discard(slot)
        else:
            self.allowed[slot] |= {number, None}
            self._time += 1
            self._order[slot] = self._time

    def _erase(self, slot: int, is_done: bool) -> None:
        """Older copies of the same block go too, if it is certain that the slot held it."""
        if not is_done:
            self._certain[slot] = len(self.allowed[slot]) == 1 and slot not in self._vague
        gone = self.allowed[slot] - {None}
        for other, held in self.allowed.items():
            is_older = self._order.get(other, 0) <= self._order.get(slot, 0)
            if held & gone and (other == slot or is_older or {other, slot} & self._vague):
                held.add(None)
                is_certain = self._certain[slot] and other not in self._vague
                if is_done and other != slot and is_certain:
                    held -= gone
        if is_done:
            self.allowed[slot] = {None}

    def check(self, store: BlockStore) -> int:
        """Everything acknowledged is there and right, and nothing else is; returns how much."""
        found = {block.slot: block.key for block in store.recover()}
        num_right = 0
        for slot, allowed in self.allowed.items():
            keys = {key_of(number): number for number in allowed if number is not None}
            if slot in found and found[slot] not in keys:
                # half overwritten: its header may be whole, but it must not be readable
                ghost = SlotRead(slot, found[slot], aligned(store.slot_payload_bytes))
                assert store.read([ghost]) != [DONE], f"slot {slot} came back from the dead"
            right = [number for number in keys.values() if self._holds(store, slot, number)]
            assert right or None in allowed, f"slot {slot}: block {allowed} is lost"
            if len(allowed) > 1:
                self.allowed[slot] = {right[0] if right else None}
                self._vague.add(slot)
            num_right += len(right)
        return num_right

    def _holds(self, store: BlockStore, slot: int, number: int) -> bool:
        outcome, payload = read_back(store, slot, number)
        assert outcome != DONE or payload == payload_of(number), f"slot {slot}: wrong bytes"
        assert cause(outcome) in (None, Cause.NOT_FOUND, Cause.CORRUPT)
        return outcome == DONE


def work(store: BlockStore, chance: random.Random, slots: Sequence[int], log: Log) -> None:
    """One random operation on some of `slots`, logged."""
    chosen = chance.sample(slots, chance.randint(1, min(5, len(slots))))
    if chance.random() < 0.5:
        chosen = sorted(slots)[chance.randrange(len(slots)) :][:5]
    dice = chance.random()
    if dice < 0.75:
        # few numbers per slot range, so that a key is often in several slots
        pairs = [(slot, 1000 * min(slots) + chance.randrange(20)) for slot in chosen]
        text = " ".join(f"{slot} {number}" for slot, number in pairs)
        log(f"W I {text}")
        outcomes = store.write([write_of(slot, number) for slot, number in pairs])
        log(f"W A {text}") if outcomes == [DONE] * len(pairs) else None
    elif dice < 0.9:
        text = " ".join(map(str, chosen[:2]))
        log(f"E I {text}")
        outcomes = store.erase(chosen[:2])
        log(f"E A {text}") if outcomes == [DONE] * len(chosen[:2]) else None
    else:
        store.touch(chosen)
        store.flush()
