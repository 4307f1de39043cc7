"""Between memory and the store: staging, writing, reading, erasing.

    stage    pool -> staging memory     the pool's slot is free; the store takes its time
    write    staging memory, arena -> store
    read     store -> staging memory -> pool     in between it can be abandoned
             store -> arena

So no call of the store, however long it takes, has to do with the pool's memory. Nothing here
starts a thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from tierkv.cache.links import Memory
from tierkv.storage import base
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore, Cause, Outcome
from tierkv.types import Erasure, Move, MoveFailure, TierName

logger = logging.getLogger(__name__)

GPU = TierName.GPU

Answer = MoveFailure | None
"""How one move ended."""

CopyPool = Callable[[list[Move], Memory, list[int]], None]
"""Copies between the moves' places in the pool and slots of other memory; returns when all bytes
are there."""

Allocate = Callable[[int, int], Memory]
"""New memory for a number of blocks of some bytes each."""


def allocate(num_slots: int, block_bytes: int) -> Memory:
    """Ordinary memory; pages are taken from the system where they are first used."""
    return Memory.of(HostArena(num_slots, block_bytes))


_FAILURES = {
    Cause.NOT_FOUND: MoveFailure.LOST,
    Cause.SHORT_READ: MoveFailure.LOST,
    Cause.CORRUPT: MoveFailure.CORRUPT,
    Cause.IO_ERROR: MoveFailure.IO_ERROR,
    Cause.NO_SPACE: MoveFailure.NO_SPACE,
    Cause.LATE: MoveFailure.LATE,
    Cause.CLOSED: MoveFailure.UNAVAILABLE,
    Cause.QUARANTINED: MoveFailure.UNAVAILABLE,
}
_NO_PARENT = bytes(base.KEY_BYTES)
_LATE: Answer = MoveFailure.LATE


class Staging:
    """Memory for blocks on their way to the store, so that the pool need not keep them.

    Args:
        memory: a slot for each block.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.num_slots = num_slots = len(memory.slots)
        self._free = list(range(num_slots - 1, -1, -1))
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self, count: int) -> list[int] | None:
        """Wait for `count` free slots; None once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._free) >= count)
            if self._is_closed:
                return None
            return [self._free.pop() for _ in range(count)]

    def give_back(self, slots: list[int]) -> None:
        """These slots' bytes are not needed any more."""
        with self._changed:
            self._free.extend(slots)
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits for room any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class StorePort:
    """The store, and the staging memory before it.

    Args:
        store: slots of `slot_bytes`.
        memory: the tiers in memory, without the pool.
        slot_bytes, block_bytes: of a block with its padding and without.
        staging_bytes: of blocks that are staged at once.
        read_pool: copies blocks out of the pool; used by `stage` only.
        allocate: makes staging memory.
    """

    def __init__(
        self,
        store: BlockStore,
        memory: Mapping[TierName, Memory],
        slot_bytes: int,
        block_bytes: int,
        staging_bytes: int,
        read_pool: CopyPool,
        allocate: Allocate = allocate,
    ) -> None:
        self.store = store
        self._memory = memory
        self._slot_bytes, self._block_bytes = slot_bytes, block_bytes
        self._read_pool, self._allocate = read_pool, allocate
        self._staging = Staging(allocate(max(1, -(-staging_bytes // block_bytes)), block_bytes))
        self._staged: dict[int, int] = {}
        self._wanted: set[int] = set()
        self._lock = threading.Lock()

    @property
    def num_staged(self) -> int:
        """Blocks that can be staged at once."""
        return self._staging.num_slots

    def stage(self, moves: list[Move]) -> list[int] | None:
        """Copy what comes from the pool, once there is room.

        Returns:
            The tickets whose place in the pool is not needed any more; None after `close`.
        """
        pooled = [move for move in moves if move.source is GPU]
        slots = self._staging.take(len(pooled))
        if slots is None:
            return None
        if pooled:
            self._read_pool(pooled, self._staging.memory, slots)
        tickets = [move.ticket for move in pooled]
        self._staged |= zip(tickets, slots, strict=True)
        return tickets

    def write(self, moves: list[Move]) -> list[Answer]:
        """Write moves that went through `stage`."""
        slots = {m.ticket: self._staged.pop(m.ticket) for m in moves if m.source is GPU}
        try:
            outcomes = self.store.write([self._write_of(m, slots.get(m.ticket)) for m in moves])
            return [_answer(outcome) for outcome in outcomes]
        finally:
            self._staging.give_back(list(slots.values()))

    def _write_of(self, move: Move, staged_at: int | None) -> base.SlotWrite:
        if staged_at is not None:
            payload = self._staging.memory.view(staged_at)
        else:
            payload = self._memory[move.source].view(move.source_slot)
        parent = move.parent or _NO_PARENT
        return base.SlotWrite(move.destination_slot, move.key, parent, move.tokens, payload)

    def erase(self, slots: list[int]) -> list[Erasure]:
        """Erase slots, each once."""
        slots = list(dict.fromkeys(slots))
        try:
            answers = [_answer(outcome) for outcome in self.store.erase(slots)]
        except OSError as error:
            logger.warning("%d erasures failed: %s", len(slots), error)
            answers = [MoveFailure.IO_ERROR] * len(slots)
        return [Erasure(slot, answer) for slot, answer in zip(slots, answers, strict=True)]

    # ------------------------------------------------------------------ up

    def expect(self, moves: Sequence[Move]) -> None:
        """These moves will be given to a reader; until their bytes are there, those into the pool
        can be abandoned."""
        with self._lock:
            self._wanted.update(move.ticket for move in moves if move.destination is GPU)

    def claim(self, tickets: Sequence[int]) -> list[int]:
        """Those that nobody else has claimed: they are abandoned, and will not touch the pool any
        more, or their bytes have arrived and go on."""
        with self._lock:
            claimed = [ticket for ticket in tickets if ticket in self._wanted]
            self._wanted.difference_update(claimed)
        return claimed

    def reader(
        self, batch_bytes: int, write_pool: CopyPool
    ) -> Callable[[list[Move]], list[Answer]]:
        """What one thread reads its batches with; `write_pool` copies what has arrived."""
        count = max(1, batch_bytes // self._slot_bytes)
        staging = self._allocate(count, self._block_bytes)

        def read(moves: list[Move]) -> list[Answer]:
            answers = dict.fromkeys((move.ticket for move in moves), _LATE)
            for batch in _distinct([move for move in moves if self._is_wanted(move)]):
                answers |= self._read(batch, staging, write_pool)
            return [answers[move.ticket] for move in moves]

        return read

    def _is_wanted(self, move: Move) -> bool:
        return move.destination is not GPU or move.ticket in self._wanted

    def _read(self, batch: list[Move], staging: Memory, write_pool: CopyPool) -> dict[int, Answer]:
        """Blocks of the pool are read into staging memory and copied when they are complete."""
        reads = []
        for i, move in enumerate(batch):
            out = staging.view(i)
            if move.destination is not GPU:
                out = self._memory[move.destination].view(move.destination_slot)
            reads.append(base.SlotRead(move.source_slot, move.key, out))
        pooled = {move.ticket: i for i, move in enumerate(batch) if move.destination is GPU}
        try:
            outcomes = self.store.read(reads)
        finally:
            landing = self.claim(list(pooled))
        answers = {m.ticket: _answer(o) for m, o in zip(batch, outcomes, strict=True)}
        answers |= dict.fromkeys(pooled.keys() - set(landing), _LATE)
        arrived = [pooled[ticket] for ticket in landing if answers[ticket] is None]
        if arrived:
            write_pool([batch[i] for i in arrived], staging, arrived)
        return answers

    def close(self) -> None:
        """Nobody waits for room any more."""
        self._staging.close()


def _distinct(moves: list[Move]) -> Iterator[list[Move]]:
    """The moves in parts that name no slot twice: two tiers may want one block."""
    while moves:
        first: dict[int, Move] = {}
        rest = [move for move in moves if first.setdefault(move.source_slot, move) is not move]
        yield list(first.values())
        moves = rest


def _answer(outcome: Outcome) -> Answer:
    return _FAILURES[outcome.cause] if isinstance(outcome, base.Failure) else None
