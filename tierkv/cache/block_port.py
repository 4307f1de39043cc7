"""The bytes of blocks, for whoever stands outside the tiers: export, import, sleep."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future

from tierkv.cache.pools import GpuPool
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore, Done, SlotRead
from tierkv.types import BlockKey, TierName

logger = logging.getLogger(__name__)


class TierPort:
    """A `BlockPort` over the tiers that there are.

    Args:
        pool: the GPU tier.
        arena, store: the tiers below.
    """

    def __init__(
        self, pool: GpuPool, arena: HostArena | None = None, store: BlockStore | None = None
    ) -> None:
        self._pool, self._arena, self._store = pool, arena, store

    def read(self, tier: TierName, slot: int, key: BlockKey) -> Future[bytes | None]:
        found: Future[bytes | None] = Future()
        if tier is TierName.GPU:
            found.set_result(self._pool.read(slot))
        elif tier is TierName.CPU and self._arena is not None:
            found.set_result(bytes(self._arena.view(slot)))
        elif self._store is not None:
            # A disk that never answers must not hold up the engine, nor its end.
            arguments = self._store, slot, key, found
            threading.Thread(target=self._read_stored, args=arguments, daemon=True).start()
        return found

    def _read_stored(
        self, store: BlockStore, slot: int, key: BlockKey, found: Future[bytes | None]
    ) -> None:
        try:
            out = memoryview(bytearray(store.slot_payload_bytes))
            (outcome,) = store.read([SlotRead(slot, key, out)])
            is_there = isinstance(outcome, Done)
            found.set_result(bytes(out[: self._pool.block_bytes]) if is_there else None)
        except Exception:
            logger.exception("a stored block could not be read")
            found.set_result(None)

    def write(self, slot: int, payload: bytes) -> None:
        self._pool.write(slot, payload)

    def give_back(self) -> int:
        return self._pool.give_back()
