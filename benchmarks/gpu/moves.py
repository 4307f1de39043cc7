"""How near to the link's limit do blocks move, and does the forward notice?

All through the engine's own mover; every figure beside plain copies of pinned memory (`limits`).
Sizes of blocks from 64 KiB, where a copy's overhead decides, to the 2 MiB of an 8B model.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gpu.attention import attend, each_layer, paged
from gpu.setup import HEADS_SHAPE, Rows, Setup, plain_row, share, shown, target_row, tried
from tierkv.cache.layout import KVLayout
from tierkv.cache.mover import ThreadMover
from tierkv.cache.pools import GpuPool
from tierkv.protocols import Mover
from tierkv.storage.arena import HostArena
from tierkv.storage.directory import StoreSpec, open_directory
from tierkv.storage.io import OpenIo
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.nvme_store import NvmeStore
from tierkv.types import Move, MovePriority, TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
DOWN, UP = (GPU, CPU), (CPU, GPU)
KIB, MIB = 1 << 10, 1 << 20
TARGETS = {64 * KIB: 0.7, 2 * MIB: 0.9}
TARGET_BOTH = 0.8
LAYER_BYTES = 64 * KIB
"""Of one layer of a block: 16 tokens, 8 heads of 128, bf16."""


class Tiers:
    """Pool and arena of `count` blocks each, twice: one half for each direction."""

    def __init__(
        self, setup: Setup, block_bytes: int, count: int, store: NvmeStore | None = None
    ) -> None:
        layout = KVLayout(max(1, block_bytes // LAYER_BYTES), 8, 128, 16, "bfloat16")
        self.count, self.block_bytes = count, layout.block_bytes
        self.pool = GpuPool(layout, 2 * count, setup.device)
        self.arena = HostArena(2 * count, layout.block_bytes)
        self.arena.array[:] = 1  # its pages are taken from the system now
        self.mover = make_mover(setup, self.pool, self.arena, store)
        self._tickets = 0

    def moves(self, link: tuple[TierName, TierName], seed: int = 0) -> list[Move]:
        """`count` blocks over a link, from random slots to random slots of the link's half."""
        first = self.count if link == UP else 0
        shuffled = random.Random(seed)
        froms, tos = (
            [first + slot for slot in shuffled.sample(range(self.count), self.count)]
            for _ in range(2)
        )
        begun = []
        for a, b in zip(froms, tos, strict=True):
            self._tickets += 1
            key = a.to_bytes(16, "little")
            begun.append(
                Move(self._tickets, key, b"", b"", link[0], a, link[1], b, MovePriority.DEMAND)
            )
        return begun

    def drive(self, moves: Sequence[Move]) -> float:
        """Seconds until all have ended.

        Raises:
            RuntimeError: one failed.
        """
        start = time.perf_counter()
        self.mover.begin(moves)
        ended = 0
        while ended < len(moves):
            self.mover.wait(60.0)
            self.mover.poll_released()
            results = self.mover.poll()
            failed = [result for result in results if result.failure is not None]
            if failed:
                raise RuntimeError(f"moves failed: {failed[:3]}")
            ended += len(results)
        return time.perf_counter() - start


def make_mover(
    setup: Setup, pool: GpuPool, arena: HostArena | None, store: NvmeStore | None
) -> Mover:
    """The engine's mover for the pool's device; on a GPU once the arena is registered."""
    if setup.device.type == "cpu":
        return ThreadMover(pool, arena, store)
    from tierkv.cache.cuda.mover import CudaMover

    mover = CudaMover(pool, arena, store)
    mover.warm_up(60.0)
    return mover


@contextmanager
def tiers_of(
    setup: Setup, block_bytes: int, count: int, store: NvmeStore | None = None
) -> Iterator[Tiers]:
    tiers = Tiers(setup, block_bytes, count, store)
    try:
        yield tiers
    finally:
        tiers.mover.close()
        del tiers.pool


# ---------------------------------------------------------------------- are the bytes right


def check(setup: Setup) -> dict[str, Any]:
    """Blocks that arrive with other bytes, down and up again, while the device computes."""
    wrong: list[str] = []
    for block_bytes in setup.size((LAYER_BYTES, 4 * LAYER_BYTES, 32 * LAYER_BYTES), (LAYER_BYTES,)):
        with tiers_of(setup, block_bytes, setup.size(200, 8)) as tiers:
            wrong += [f"{block_bytes >> 10} KiB, {link}" for link in moved_wrong(setup, tiers)]
    return {"wrong": wrong}


def moved_wrong(setup: Setup, tiers: Tiers) -> list[str]:
    """Directions in which a block's bytes were not those of its source when the move began.

    Sources are written by the device right before, on the stream of the forward: a copy that does
    not wait for it takes the old bytes.
    """
    bad = []
    shape = tiers.pool.tensor[: tiers.count].shape
    busy = setup.randn(setup.size(4096, 16), setup.size(4096, 16))
    fresh = setup.randn(*shape)
    for _ in range(setup.size(20, 1)):
        busy = torch.tanh(busy @ busy)  # so that the write below is still to come when moves begin
    tiers.pool.tensor[: tiers.count].copy_(fresh)
    down = tiers.moves(DOWN)
    tiers.drive(down)
    expected = fresh.cpu().view(torch.uint8).view(tiers.count, -1).numpy()
    found = tiers.arena.array[:, : tiers.block_bytes]
    if any(not np.array_equal(found[m.destination_slot], expected[m.source_slot]) for m in down):
        bad.append("down")
    source = tiers.arena.array[tiers.count :, : tiers.block_bytes]
    source[:] = np.random.default_rng().integers(0, 256, source.shape, np.uint8)
    up = tiers.moves(UP)
    tiers.drive(up)
    setup.synchronize()
    rows = tiers.pool.tensor.view(torch.uint8).view(2 * tiers.count, -1).cpu().numpy()
    sources = tiers.arena.array[:, : tiers.block_bytes]
    if any(not np.array_equal(rows[m.destination_slot], sources[m.source_slot]) for m in up):
        bad.append("up")
    return bad


def check_rows(found: dict[str, Any]) -> Rows:
    wrong = found["wrong"]
    yield "moves whose bytes are wrong", ", ".join(wrong) or "0", "<= 0", "no" if wrong else "yes"


# ---------------------------------------------------------------------- how fast


def rates(setup: Setup) -> dict[str, Any]:
    """GB/s of each direction and of both, by block size; and decode steps meanwhile."""
    found: dict[str, Any] = {"block_bytes": {}}
    for block_bytes in setup.size((64 * KIB, 256 * KIB, MIB, 2 * MIB), (64 * KIB,)):
        count = setup.size((1 << 30) // block_bytes, 8)
        with tiers_of(setup, block_bytes, count) as tiers:
            found["block_bytes"][str(block_bytes)] = rates_at(setup, tiers)
    with tiers_of(setup, 2 * MIB, setup.size(1024, 2)) as tiers:
        found["decode"] = decode_meanwhile(setup, tiers)
    return found


def rates_at(setup: Setup, tiers: Tiers) -> dict[str, Any]:
    repeats = setup.size(5, 1)
    total = tiers.count * tiers.block_bytes
    seconds = {
        "down": [tiers.drive(tiers.moves(DOWN, seed)) for seed in range(repeats)],
        "up": [tiers.drive(tiers.moves(UP, seed)) for seed in range(repeats)],
        "both": [
            tiers.drive([*tiers.moves(DOWN, seed), *tiers.moves(UP, seed)])
            for seed in range(repeats)
        ],
    }
    entry: dict[str, Any] = {}
    for name, times in seconds.items():
        rate = total * (2 if name == "both" else 1) / statistics.median(times) / 1e9
        limit = setup.limits.get(f"{name}_gb_per_s")
        entry[name] = {"gb_per_s": round(rate, 2), "share_of_memcpy": share(rate, limit)}
    return entry


def decode_meanwhile(setup: Setup, tiers: Tiers) -> dict[str, Any]:
    """Milliseconds of a step of 32 layers of decode, alone and while both links are busy."""
    batch, context = setup.size((64, 4096), (2, 64))
    pool, meta = paged(setup, batch, context, 16)
    q = setup.randn(batch, *HEADS_SHAPE)
    layer = each_layer(pool, lambda kv: attend(q, kv, meta))

    def step() -> float:
        start = time.perf_counter()
        for _ in range(setup.size(32, 1)):
            layer()
        setup.synchronize()
        return time.perf_counter() - start

    for _ in range(setup.size(5, 1)):
        step()
    count = setup.size(200, 3)
    alone = [step() for _ in range(count)]
    busy: list[float] = []
    while len(busy) < count:
        moves = [*tiers.moves(DOWN, len(busy)), *tiers.moves(UP, len(busy))]
        tiers.mover.begin(moves)
        ended = 0
        while ended < len(moves):
            busy.append(step())
            tiers.mover.poll_released()
            ended += len(tiers.mover.poll())
    return {
        name: {
            "p50_ms": round(1000 * statistics.median(times), 3),
            "p99_ms": round(1000 * sorted(times)[int(0.99 * len(times))], 3),
        }
        for name, times in (("alone", alone), ("while moving", busy))
    }


def rates_rows(found: dict[str, Any]) -> Rows:
    for size, entry in found["block_bytes"].items():
        for name, figures in entry.items():
            what = f"blocks of {int(size) >> 10} KiB, {name}"
            yield plain_row(what, figures["gb_per_s"], "GB/s")
            target = TARGET_BOTH if name == "both" else TARGETS.get(int(size))
            if target is not None:
                yield target_row(f"{what}, of memcpy", figures["share_of_memcpy"], target)
    alone, busy = (found["decode"][name]["p99_ms"] for name in ("alone", "while moving"))
    yield plain_row("decode step, p99, alone", alone, "ms")
    yield target_row("decode step, p99, while both links move", busy / alone, 1.1, at_most=True)


# ---------------------------------------------------------------------- the store


def store(setup: Setup) -> dict[str, Any]:
    """GB/s between pool and store by I/O engine, in a folder of this machine's disk."""
    engines: dict[str, OpenIo] = {"posix": PosixIo}
    found: dict[str, Any] = {}
    if setup.device.type == "cuda":
        try:
            from tierkv.storage.io_kvikio import KvikioIo, load_kvikio

            load_kvikio()
            engines["kvikio"] = KvikioIo
        except Exception as error:  # it is a peer here: whatever it lacks is its figure
            found["kvikio"] = f"{type(error).__name__}: {error}"
    for name, open_io in engines.items():
        found[name] = tried_store(setup, name, open_io)
    return found


def tried_store(setup: Setup, name: str, open_io: OpenIo) -> Any:
    figures: dict[str, float] = {}

    def run() -> float:
        figures.update(store_rates(setup, name, open_io))
        return 0.0

    failure = tried(run)
    return figures if failure == 0.0 else failure


def store_rates(setup: Setup, name: str, open_io: OpenIo) -> dict[str, float]:
    block_bytes, count = 2 * MIB, setup.size(1024, 4)
    spec = StoreSpec("benchmark", block_bytes, 2 * count)
    opened = NvmeStore(open_directory(setup.folder / name, spec, open_io), num_threads=4)
    try:
        with tiers_of(setup, block_bytes, count, opened) as tiers:
            down = tiers.moves((GPU, NVME))
            seconds = tiers.drive(down)
            total = count * tiers.block_bytes
            up = [
                Move(-m.ticket, m.key, b"", b"", NVME, m.destination_slot, GPU, m.source_slot,
                     MovePriority.DEMAND)
                for m in down
            ]  # fmt: skip
            found = {"write_gb_per_s": round(total / seconds / 1e9, 2)}
            found["read_gb_per_s"] = round(total / tiers.drive(up) / 1e9, 2)
            return found
    finally:
        opened.close()


def store_rows(found: dict[str, Any]) -> Rows:
    for name, entry in found.items():
        if isinstance(entry, str):
            yield f"store, {name}", entry, "", ""
            continue
        for verb in ("write", "read"):
            rate = entry[f"{verb}_gb_per_s"]
            yield f"store, {name}, {verb}", shown(rate, "GB/s"), "", ""
