"""A mover around the real one that compares the bytes of every move that says it succeeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tierkv.cache.pools import GpuPool
from tierkv.protocols import Mover
from tierkv.storage.arena import HostArena
from tierkv.storage.base import DONE, BlockStore, SlotRead
from tierkv.types import Move, MoveResult, TierName


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
        self.compared: Counter[tuple[TierName, TierName]] = Counter()

    def begin(self, moves: Sequence[Move]) -> None:
        self._moves.update((move.ticket, move) for move in moves)
        self._inner.begin(moves)

    def poll(self) -> list[MoveResult]:
        results = self._inner.poll()
        for result in results:
            move = self._moves.pop(result.ticket)
            if result.failure is None:
                self._compare(move)
        return results

    def _compare(self, move: Move) -> None:
        source = self._bytes(move.source, move.source_slot, move.key)
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

    def erase(self, slots: Sequence[int]) -> None:
        self._inner.erase(slots)

    def close(self) -> None:
        self._inner.close()
