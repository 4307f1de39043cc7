"""What stores that stand in front of another store have in common."""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.storage.base import BlockStore, Outcome, SlotRead, SlotWrite, StoredBlock, StoreStats


class StoreWrapper:
    """A `BlockStore` that passes everything on; subclasses change what they are there for."""

    def __init__(self, inner: BlockStore) -> None:
        self._inner = inner

    @property
    def slot_payload_bytes(self) -> int:
        return self._inner.slot_payload_bytes

    @property
    def capacity(self) -> int:
        return self._inner.capacity

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        return self._inner.write(batch)

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        return self._inner.read(batch)

    def erase(self, slots: Sequence[int]) -> list[Outcome]:
        return self._inner.erase(slots)

    def recover(self) -> list[StoredBlock]:
        return self._inner.recover()

    def touch(self, slots: Sequence[int]) -> None:
        self._inner.touch(slots)

    def flush(self) -> None:
        self._inner.flush()

    def stats(self) -> StoreStats:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()
