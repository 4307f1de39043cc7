"""Movers with their tiers, whose slots hold numbered blocks, and a model of what they must hold."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from fake_gpu import FakeGpu
from ledger import Ledger, ManualClock
from ledger_mover import LedgerMover
from store_blocks import key_of, payload_of, read_back

from tierkv.cache.cuda.lanes import LaneSizes
from tierkv.cache.cuda.mover import CudaMover
from tierkv.cache.layout import KVLayout
from tierkv.cache.link_mover import LinkMover
from tierkv.cache.mover import ThreadMover
from tierkv.cache.pools import GpuPool
from tierkv.protocols import Mover
from tierkv.storage.arena import HostArena
from tierkv.storage.base import DONE, BlockStore, Cause, Outcome, SlotRead, SlotWrite
from tierkv.storage.mem_store import MemStore
from tierkv.storage.wrapper import StoreWrapper
from tierkv.types import Move, MoveFailure, MovePriority, MoveResult, TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
SLOTS = 24
EVEN = KVLayout(2, 2, 32, 16, "bfloat16")  # 8192 bytes: a slot's size
ODD = KVLayout(2, 1, 24, 16, "float32")  # 6144 bytes: padded, so staged
PATIENCE_S = 60.0
SMALL = LaneSizes(buffer_bytes=3 * 8192)  # blocks are gathered, a few at once
LARGE = LaneSizes(direct_bytes=0, buffer_bytes=2 * 8192)  # each block is a copy
EXPECTED = {
    Cause.NOT_FOUND: MoveFailure.LOST,
    Cause.SHORT_READ: MoveFailure.LOST,
    Cause.CORRUPT: MoveFailure.CORRUPT,
    Cause.NO_SPACE: MoveFailure.NO_SPACE,
    Cause.QUARANTINED: MoveFailure.UNAVAILABLE,
    Cause.CLOSED: MoveFailure.UNAVAILABLE,
    Cause.LATE: MoveFailure.LATE,
    Cause.IO_ERROR: MoveFailure.IO_ERROR,
}

payload = lru_cache(maxsize=4096)(payload_of)


class ThreadWorld:
    """A `ThreadMover` and its tiers, whose slots hold numbered blocks."""

    mover: LinkMover

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
        self.mover = self._make(options)
        self.tiers = [GPU, *[CPU] * has_arena, *[NVME] * (store is not None)]

    def _make(self, options: dict[str, float]) -> LinkMover:
        return ThreadMover(self.pool, self.arena, self.store, **options)  # type: ignore[arg-type]

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


class CudaWorld(ThreadWorld):
    """A `CudaMover` on a fake GPU, whose compute stream writes the blocks of the pool."""

    def __init__(
        self,
        layout: KVLayout = EVEN,
        store: BlockStore | None = None,
        *,
        gpu: FakeGpu | None = None,
        sizes: LaneSizes = SMALL,
        has_arena: bool = True,
        **options: float,
    ) -> None:
        self.gpu = gpu or FakeGpu(random.randrange(1 << 32))
        self.sizes = sizes
        super().__init__(layout, store, has_arena=has_arena, **options)

    def _make(self, options: dict[str, float]) -> LinkMover:
        self.gpu.adopt(self.pool.tensor)
        tiers = self.pool, self.arena, self.store
        size = self.layout.slot_bytes
        less = {"staging_bytes": 64 << 10, "read_bytes": 4 * size, "piece_bytes": 3 * size}
        more = {**less, **options}
        return CudaMover(*tiers, device=self.gpu, sizes=self.sizes, **more)  # type: ignore[arg-type]

    def fill(self, tier: TierName, slot: int, number: int) -> None:
        if tier is GPU:
            self.gpu.launch(lambda: super(CudaWorld, self).fill(tier, slot, number))
        else:
            super().fill(tier, slot, number)

    def holds(self, tier: TierName, slot: int, number: int) -> bool:
        self.gpu.synchronize(self.gpu.record(self.gpu.compute))
        return super().holds(tier, slot, number)

    def close(self) -> None:
        super().close()
        self.gpu.close()


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


class AnsweringStore(StoreWrapper):
    """Every write, read and erasure ends as it is told to."""

    def __init__(self, inner: BlockStore, answer: Callable[[], Outcome]) -> None:
        super().__init__(inner)
        self._answer = answer

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        return [self._answer() for _ in batch]

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        return [self._answer() for _ in batch]

    def erase(self, slots: Sequence[int]) -> list[Outcome]:
        return [self._answer() for _ in slots]


class GatedStore(StoreWrapper):
    """Calls wait until `opened`; remembers the slots of each."""

    def __init__(self, inner: BlockStore) -> None:
        super().__init__(inner)
        self.entered, self.opened = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        self._pass([write.slot for write in batch])
        return self._inner.write(batch)

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        self._pass([read.slot for read in batch])
        return self._inner.read(batch)

    def close_gate(self) -> None:
        """As new."""
        self.entered.clear()
        self.opened.clear()
        self.batches.clear()

    def _pass(self, slots: list[int]) -> None:
        self.batches.append(slots)
        self.entered.set()
        assert self.opened.wait(PATIENCE_S)


def block_the_link(world: ThreadWorld, is_read: bool) -> None:
    """One move that waits in the store, from or to its slot 0."""
    ends = ((NVME, 0), (GPU, 0)) if is_read else ((GPU, 0), (NVME, 0))
    world.mover.begin([move(0, 0, *ends)])
    assert world.store.entered.wait(PATIENCE_S)


def raising(error: BaseException) -> Outcome:
    raise error


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
        mover.poll_released()
        results += mover.poll()
        assert time.monotonic() < end, f"{len(results)} of {count} moves ended"
    return results


def pairs(tiers: Sequence[TierName]) -> list[tuple[TierName, TierName]]:
    return [(source, to) for source in tiers for to in tiers if source is not to]


class Model:
    """What each slot of a world must hold, and which are in use by moves that have not ended.

    Args:
        abandons: now and then nobody wants what is on its way from the store to the pool.
    """

    def __init__(self, world: World, seed: int, *, abandons: bool = False) -> None:
        self._abandons = abandons
        self.world, self.rng = world, random.Random(seed)
        self.held: dict[tuple[TierName, int], int] = {}
        self.readers: Counter[tuple[TierName, int]] = Counter()
        self.filling: set[tuple[TierName, int]] = set()
        self.moves: dict[int, Move] = {}
        self.numbers: dict[int, int] = {}
        self.released: set[int] = set()
        self.abandoned: set[int] = set()
        self.num_begun = 0
        for number in range(SLOTS // 2):
            world.fill(GPU, number, number)
            self.held[GPU, number] = number

    def begin(self, count: int) -> None:
        moves = [drawn for _ in range(count) if (drawn := self._draw()) is not None]
        self.world.mover.begin(moves)

    def poll(self) -> list[MoveResult]:
        for ticket in self.world.mover.poll_released():
            self._spoil(self.moves[ticket])  # a KeyError: released after its end
            self.released.add(ticket)
        results = self._ended(self.world.mover.poll())
        loads = [t for t, m in self.moves.items() if m.destination is GPU and m.source is NVME]
        if self._abandons and loads and self.rng.random() < 0.1:
            chosen = self.rng.sample(loads, self.rng.randint(1, len(loads)))
            self.abandoned.update(chosen)
            self.world.mover.abandon(chosen)
        return results

    def _ended(self, results: list[MoveResult]) -> list[MoveResult]:
        """Results without those of moves that were given up."""
        for result in results:
            done = self.moves.pop(result.ticket)  # a KeyError: reported twice
            if done.destination is GPU or result.ticket not in self.released:
                self.readers[done.source, done.source_slot] -= 1
            place = (done.destination, done.destination_slot)
            if done.destination is GPU and result.ticket in self.released:
                assert result.failure is MoveFailure.LATE
                continue
            self.filling.remove(place)
            if result.failure is None:
                self.held[place] = self.numbers[result.ticket]
        return [result for result in results if result.ticket not in self.abandoned]

    def _spoil(self, move: Move) -> None:
        """The move's slot in the pool was released: other bytes go there unless others read it."""
        place = (move.source, move.source_slot)
        if move.destination is GPU:
            place = (move.destination, move.destination_slot)
            self.filling.remove(place)
        else:
            self.readers[place] -= 1
        if not self.readers[place]:
            number = self.held[place] = self.rng.randrange(SLOTS, 2 * SLOTS)
            self.world.fill(*place, number)

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
