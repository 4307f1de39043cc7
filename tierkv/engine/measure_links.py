"""What moves between the tiers take, for the simulator: the real mover between real tiers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tierkv.cache.layout import KVLayout
from tierkv.cache.link_mover import LinkMover
from tierkv.cache.pools import GpuPool
from tierkv.engine.tiers import make_mover
from tierkv.errors import TierkvError
from tierkv.storage.arena import HostArena
from tierkv.storage.nvme_store import NvmeStore
from tierkv.storage.root import open_store
from tierkv.types import Move, MovePriority, TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
_BYTES, _MOST_BLOCKS, _LEAST_BLOCKS = 256 << 20, 2048, 8
_WAIT_S = 60.0


@dataclass(slots=True, frozen=True)
class LinkRates:
    """Bytes per second of many moves, seconds of one alone.

    Attributes:
        up, down: between CPU memory and the pool; both: at once, together.
        read, write: of the persistent tier; 0 when it was not measured.
        latency_s, drive_latency_s: of one block each, less its bytes at the rate above.
    """

    up: float
    down: float
    both: float
    latency_s: float
    read: float = 0.0
    write: float = 0.0
    drive_latency_s: float = 0.0


def measure_links(layout: KVLayout, device: str, folder: Path | None) -> LinkRates:
    """Move blocks of this layout each way.

    Args:
        layout: of the blocks.
        device: of the pool.
        folder: on the drive to measure, which is written to and left as it was; None: no drive.

    Raises:
        TierkvError: a move failed, or the drive cannot be used.
    """
    count = max(_LEAST_BLOCKS, min(_MOST_BLOCKS, _BYTES // layout.slot_bytes))
    pool, arena = GpuPool(layout, count, device), HostArena(count, layout.block_bytes)
    arena.array[:] = 1  # memory that was never touched is not there yet
    with ExitStack() as stack:
        store = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            inner = tempfile.TemporaryDirectory(prefix="calibrate-", dir=folder)
            root, capacity = Path(stack.enter_context(inner)), 2 * count * layout.slot_bytes
            store = open_store(root, "calibrate", layout.slot_bytes, capacity)
            stack.callback(store.close)
        mover = make_mover(pool, arena, store)
        stack.callback(mover.close)
        mover.warm_up(_WAIT_S)
        return _rates(_Link(mover, count, layout.block_bytes), store)


def _rates(link: _Link, store: NvmeStore | None) -> LinkRates:
    for _ in range(2):  # the first time only warms up
        down, up = link.rate([(GPU, CPU)]), link.rate([(CPU, GPU)])
    both = link.rate([(GPU, CPU), (CPU, GPU)])
    latency_s = link.latency_s((CPU, GPU), up)
    if store is None:
        return LinkRates(up, down, max(both, up, down), latency_s)
    write, read = link.rate([(CPU, NVME)]), link.rate([(NVME, CPU)])
    drive_s = link.latency_s((NVME, CPU), read)
    return LinkRates(up, down, max(both, up, down), latency_s, read, write, drive_s)


class _Link:
    """Drives the mover."""

    def __init__(self, mover: LinkMover, count: int, block_bytes: int) -> None:
        self._mover = mover
        self._count = count
        self._bytes = block_bytes
        self._number = 0

    def rate(self, links: Sequence[tuple[TierName, TierName]]) -> float:
        """Bytes per second of all blocks over all links at once."""
        part = self._count // len(links)
        moves = [
            self._move(link, slot)
            for index, link in enumerate(links)
            for slot in range(index * part, (index + 1) * part)
        ]
        return len(moves) * self._bytes / self._run(moves)

    def latency_s(self, link: tuple[TierName, TierName], rate: float) -> float:
        """Of one block alone, beyond what its bytes take."""
        times = sorted(self._run([self._move(link, slot)]) for slot in range(_LEAST_BLOCKS))
        return max(0.0, times[len(times) // 2] - self._bytes / rate)

    def _move(self, link: tuple[TierName, TierName], slot: int) -> Move:
        self._number += 1
        key = slot.to_bytes(16, "little")
        source, destination = link
        return Move(
            self._number, key, b"", b"", source, slot, destination, slot, MovePriority.DEMAND
        )

    def _run(self, moves: Sequence[Move]) -> float:
        start = time.perf_counter()
        self._mover.begin(moves)
        missing = len(moves)
        while missing:
            self._mover.wait(_WAIT_S)
            results = self._mover.poll()
            failed = [result.failure for result in results if result.failure is not None]
            if failed or not results:
                raise TierkvError(f"a move failed while links were measured: {failed[:1]}")
            missing -= len(results)
        return time.perf_counter() - start
