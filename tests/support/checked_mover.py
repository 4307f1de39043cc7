"""A mover around the real one that compares the bytes of every move that says it succeeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tierkv.cache.pools import GpuPool
from tierkv.protocols import Mover
from tierkv.storage.arena import HostArena
from tierkv.storage.base import DONE, BlockStore, SlotRead
from tierkv.types import Erasure, Move, MoveResult, TierName


class CheckedMover:
    """Compares source and destination before the engine hears of the end of a move.

    Args:
        inner: the mover that copies.
        pool, arena, store: the tiers, as the inner mover has them.
    """

    def __init__(
        self, inner: Mover, pool: GpuPool, arena: HostArena | None, store: BlockStore | None
    ) -> None:
        self._inner, self._pool, self._arena, self._store = inner, pool, arena, store
        self._moves: dict[int, Move] = {}
        self._sources: dict[int, bytes | None] = {}
        self.compared: Counter[tuple[TierName, TierName]] = Counter()

    def begin(self, moves: Sequence[Move]) -> None:
        self._moves.update((move.ticket, move) for move in moves)
        self._inner.begin(moves)

    def poll(self) -> list[MoveResult]:
        results = self._inner.poll()
        for result in results:
            move = self._moves.pop(result.ticket)
            if result.ticket in self._sources:
                source = self._sources.pop(result.ticket)
            else:
                source = self._bytes(move.source, move.source_slot, move.key)
            if result.failure is None:
                self._compare(move, source)
        return results

    def poll_released(self) -> list[int]:
        released = self._inner.poll_released()
        for ticket in released:  # from now on the source may change
            move = self._moves[ticket]
            if move.source is not TierName.GPU:
                continue
            self._sources[ticket] = self._bytes(move.source, move.source_slot, move.key)
        return released

    def _compare(self, move: Move, source: bytes | None) -> None:
        destination = self._bytes(move.destination, move.destination_slot, move.key)
        if source is not None and destination is not None:
            assert source == destination, f"{move} arrived with other bytes"
            self.compared[move.source, move.destination] += 1

    def _bytes(self, tier: TierName, slot: int, key: bytes) -> bytes | None:
        """The block in a slot; None when the store could not read it just now."""
        size = self._pool.block_bytes
        if tier is TierName.GPU:
            return bytes(self._pool.tensor[slot].numpy().tobytes())
        if tier is TierName.CPU:
            assert self._arena is not None
            return bytes(self._arena.view(slot)[:size])
        assert self._store is not None
        out = bytearray(self._store.slot_payload_bytes)
        (outcome,) = self._store.read([SlotRead(slot, key, memoryview(out))])
        return bytes(out[:size]) if outcome == DONE else None

    def wait(self, timeout_s: float) -> None:
        self._inner.wait(timeout_s)

    def abandon(self, tickets: Sequence[int]) -> None:
        self._inner.abandon(tickets)

    def poll_erased(self) -> list[Erasure]:
        return self._inner.poll_erased()

    def erase(self, slots: Sequence[int]) -> None:
        self._inner.erase(slots)

    def touch(self, slots: Sequence[int]) -> None:
        self._inner.touch(slots)

    def is_quarantined(self, *, is_read: bool) -> bool:
        return self._inner.is_quarantined(is_read=is_read)

    def close(self) -> None:
        self._inner.close()
