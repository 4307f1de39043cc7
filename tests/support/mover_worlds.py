"""Movers with their tiers, whose slots hold numbered blocks, and a model of what they must hold."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from ledger import Ledger, ManualClock
from ledger_mover import LedgerMover
from store_blocks import key_of, payload_of, read_back

from tierkv.cache.layout import KVLayout
from tierkv.cache.mover import ThreadMover
from tierkv.cache.pools import GpuPool
from tierkv.protocols import Mover
from tierkv.storage.arena import HostArena
from tierkv.storage.base import DONE, BlockStore, SlotWrite
from tierkv.storage.mem_store import MemStore
from tierkv.types import Move, MovePriority, MoveResult, TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
SLOTS = 24
EVEN = KVLayout(2, 2, 32, 16, "bfloat16")  # 8192 bytes: a slot's size
ODD = KVLayout(2, 1, 24, 16, "float32")  # 6144 bytes: padded, so staged
PATIENCE_S = 60.0

payload = lru_cache(maxsize=4096)(payload_of)


class ThreadWorld:
    """A `ThreadMover` and its tiers, whose slots hold numbered blocks."""

    def __init__(
        self,
        layout: KVLayout = EVEN,
        store: BlockStore | None = None,
        *,
        has_arena: bool = True,
        **options: float,
    ) -> None:
        self.layout, self.store = layout, store
        self.pool = GpuPool(layout, SLOTS, "cpu")
        self.arena = HostArena(SLOTS, layout.block_bytes) if has_arena else None
        self.mover = ThreadMover(self.pool, self.arena, store, **options)  # type: ignore[arg-type]
        self.tiers = [GPU, *[CPU] * has_arena, *[NVME] * (store is not None)]

    def fill(self, tier: TierName, slot: int, number: int) -> None:
        data = payload(number, self.layout.block_bytes)
        if tier is GPU:
            row = torch.frombuffer(bytearray(data), dtype=self.pool.tensor.dtype)
            self.pool.tensor[slot] = row.view(self.layout.block_shape)
        elif tier is CPU:
            assert self.arena is not None
            self.arena.view(slot)[:] = data
        else:
            assert self.store is not None
            padded = memoryview(data.ljust(self.layout.slot_bytes, b"\0"))
            write = SlotWrite(slot, key_of(number), bytes(16), b"", padded)
            assert self.store.write([write]) == [DONE]

    def holds(self, tier: TierName, slot: int, number: int) -> bool:
        data = payload(number, self.layout.block_bytes)
        if tier is GPU:
            return self.pool.tensor[slot].view(torch.uint8).numpy().tobytes() == data
        if tier is CPU:
            assert self.arena is not None
            return bytes(self.arena.view(slot)) == data
        assert self.store is not None
        outcome, found = read_back(self.store, slot, number)
        return outcome == DONE and found[: len(data)] == data

    def close(self) -> None:
        self.mover.close()
        if self.store is not None:
            self.store.close()


class LedgerWorld:
    """The fake that the cache is tested with; a block is a row of equal numbers."""

    def __init__(self, is_eager: bool) -> None:
        self.tiers = [GPU, CPU, NVME]
        capacities = {CPU: SLOTS, NVME: SLOTS}
        self.mover = LedgerMover(Ledger(SLOTS, 4), capacities, ManualClock(), is_eager=is_eager)

    def fill(self, tier: TierName, slot: int, number: int) -> None:
        self.mover.tiers[tier][slot][:] = [number] * 4

    def holds(self, tier: TierName, slot: int, number: int) -> bool:
        return self.mover.tiers[tier][slot] == [number] * 4

    def close(self) -> None:
        self.mover.close()


World = ThreadWorld | LedgerWorld


def mem(layout: KVLayout = EVEN) -> MemStore:
    return MemStore(SLOTS, layout.slot_bytes)


def move(
    ticket: int,
    number: int,
    source: tuple[TierName, int],
    destination: tuple[TierName, int],
    priority: MovePriority = MovePriority.DEMAND,
) -> Move:
    parent, tokens = key_of(number - 1), number.to_bytes(4, "little")
    return Move(ticket, key_of(number), parent, tokens, *source, *destination, priority)


def finish(mover: Mover, count: int) -> list[MoveResult]:
    """The next `count` results."""
    results: list[MoveResult] = []
    end = time.monotonic() + PATIENCE_S
    while len(results) < count:
        mover.wait(1.0)
        results += mover.poll()
        assert time.monotonic() < end, f"{len(results)} of {count} moves ended"
    return results


def pairs(tiers: Sequence[TierName]) -> list[tuple[TierName, TierName]]:
    return [(source, to) for source in tiers for to in tiers if source is not to]


class Model:
    """What each slot of a world must hold, and which are in use by moves that have not ended."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, random.Random(seed)
        self.held: dict[tuple[TierName, int], int] = {}
        self.readers: Counter[tuple[TierName, int]] = Counter()
        self.filling: set[tuple[TierName, int]] = set()
        self.moves: dict[int, Move] = {}
        self.numbers: dict[int, int] = {}
        self.num_begun = 0
        for number in range(SLOTS // 2):
            world.fill(GPU, number, number)
            self.held[GPU, number] = number

    def begin(self, count: int) -> None:
        moves = [drawn for _ in range(count) if (drawn := self._draw()) is not None]
        self.world.mover.begin(moves)

    def poll(self) -> list[MoveResult]:
        results = self.world.mover.poll()
        for result in results:
            done = self.moves.pop(result.ticket)  # a KeyError: reported twice
            self.readers[done.source, done.source_slot] -= 1
            place = (done.destination, done.destination_slot)
            self.filling.remove(place)
            if result.failure is None:
                self.held[place] = self.numbers[result.ticket]
        return results

    def drain(self) -> list[MoveResult]:
        results = []
        end = time.monotonic() + PATIENCE_S
        while self.moves:
            self.world.mover.wait(1.0)
            results += self.poll()
            assert time.monotonic() < end
        return results

    def check(self, tiers: Sequence[TierName]) -> None:
        for (tier, slot), number in self.held.items():
            assert tier not in tiers or self.world.holds(tier, slot, number), (tier, slot, number)

    def _draw(self) -> Move | None:
        """A move from a slot that holds a block to one that nobody uses."""
        source_tier, to = self.rng.choice(pairs(self.world.tiers))
        sources = [place for place in self.held if place[0] is source_tier]
        empty = [(to, slot) for slot in range(SLOTS) if not self._is_used((to, slot))]
        if not sources or not empty:
            return None
        source, destination = self.rng.choice(sources), self.rng.choice(empty)
        self.held.pop(destination, None)
        self.filling.add(destination)
        self.readers[source] += 1
        self.num_begun += 1
        ticket, number = self.num_begun, self.held[source]
        drawn = move(ticket, number, source, destination, self.rng.choice(list(MovePriority)))
        self.moves[ticket], self.numbers[ticket] = drawn, number
        return drawn

    def _is_used(self, place: tuple[TierName, int]) -> bool:
        return place in self.filling or self.readers[place] > 0
