"""How fast do blocks move between the tiers, compared with what the machine can do?

Between pool and arena against one plain memcpy of the same bytes; between arena and NVMe store
against fio (where it is installed) with the same sizes, as many operations at once, O_DIRECT, and
for writes a sync after as many bytes. Slots are in random order, so that no two neighbours become
one operation; for NVMe also in order, as the blocks of a prompt are where nothing was evicted yet,
against fio in order. The sweep says how many bytes must be in flight to reach a link's rate.

    python benchmarks/moves.py [--folder DIR]      DIR is on the device to measure
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common.models import cache_dir
from common.plots import plt
from common.runs import Run, Samples, alternate, parse, parser, print_table, write

from tierkv.cache.layout import KVLayout
from tierkv.cache.mover import ThreadMover
from tierkv.cache.pools import GpuPool
from tierkv.storage.arena import HostArena
from tierkv.storage.directory import StoreSpec, open_directory
from tierkv.storage.flow import DEPTH
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.io_queue import LARGE_BYTES
from tierkv.storage.nvme_store import NvmeStore
from tierkv.storage.record import slot_bytes
from tierkv.types import Move, MovePriority, TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
KIB, MIB = 1 << 10, 1 << 20
BLOCK_BYTES = (32 * KIB, 256 * KIB, MIB, 4 * MIB)
SWEPT_BYTES = 256 * KIB
STORE_THREADS, NUM_READERS, WRITE_BYTES = 4, 2, 32 * MIB
TARGETS = {size: 0.5 if size == 32 * KIB else 0.85 for size in BLOCK_BYTES}
TARGET_NVME = 0.85
ORDERS = ("in order", "random")
LINKS = {
    "pool -> arena": (GPU, CPU),
    "arena -> pool": (CPU, GPU),
    "arena -> NVMe": (CPU, NVME),
    "NVMe -> arena": (NVME, CPU),
}


class Tiers:
    """Pool, arena and maybe a store with `count` blocks each, all of them written once."""

    def __init__(
        self, block_bytes: int, count: int, store: NvmeStore | None = None, order: str = "random"
    ) -> None:
        layout = KVLayout(block_bytes // 2048, 1, 32, 16, "bfloat16")
        self.count, self.block_bytes = count, block_bytes
        self.pool, self.arena = GpuPool(layout, count, "cpu"), HostArena(count, block_bytes)
        self.pool.tensor.fill_(1)
        self.arena.array[:] = np.random.default_rng(0).integers(0, 256, self.arena.stride)
        self.mover = ThreadMover(
            self.pool, self.arena, store, write_bytes=WRITE_BYTES, num_readers=NUM_READERS
        )
        shuffled = random.Random(0)
        self._slots = [list(range(count)) for _ in range(2)]
        if order == "random":
            for slots in self._slots:
                shuffled.shuffle(slots)

    def moves(self, link: str) -> list[Move]:
        """All blocks over one link, from random slots to random slots; NVMe slot i keeps key i."""
        source, destination = LINKS[link]
        froms, tos = self._slots if NVME not in LINKS[link] else [self._slots[0]] * 2
        return [
            Move(a, a.to_bytes(16, "little"), b"", b"", *(source, a), *(destination, b), _PRIORITY)
            for a, b in zip(froms, tos, strict=True)
        ]

    def run(self, link: str, rounds: int = 1, in_flight_bytes: int = 1 << 62) -> dict[str, Any]:
        """Move all blocks `rounds` times with at most so many bytes in flight."""
        moves = self.moves(link)
        limit = max(1, in_flight_bytes // self.block_bytes)
        start = time.perf_counter()
        for _ in range(rounds):
            self._drive(moves, limit)
        return {"_seconds": (time.perf_counter() - start) / rounds}

    def _drive(self, moves: Sequence[Move], limit: int) -> None:
        begun = ended = 0
        while ended < len(moves):
            batch = moves[begun : ended + limit]
            self.mover.begin(batch)
            begun += len(batch)
            self.mover.wait(60.0)
            results = self.mover.poll()
            failed = [result for result in results if result.failure is not None]
            if failed or not results:
                raise RuntimeError(f"moves failed: {failed[:3]}")
            ended += len(results)


_PRIORITY = MovePriority.DEMAND


@contextmanager
def opened(folder: Path, block_bytes: int, count: int) -> Iterator[NvmeStore]:
    """A new store on the device, deleted at the end."""
    spec = StoreSpec("benchmark", block_bytes, count)
    store = NvmeStore(open_directory(folder / "store", spec, PosixIo), num_threads=STORE_THREADS)
    try:
        yield store
    finally:
        store.close()
        shutil.rmtree(folder / "store")


def memcpy(total_bytes: int, rounds: int) -> Run:
    """One copy of all bytes in one piece."""
    source, target = np.ones(total_bytes, np.uint8), np.zeros(total_bytes, np.uint8)

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(rounds):
            np.copyto(target, source)
        return {"_seconds": (time.perf_counter() - start) / rounds}

    return run


def fio(folder: Path, block_bytes: int, total_bytes: int, verb: str, order: str) -> Run:
    """fio with as many operations at once as the store has, and slots in the same order."""
    size = slot_bytes(block_bytes)
    per_call = DEPTH if size < LARGE_BYTES else STORE_THREADS
    depth = per_call * (NUM_READERS if verb == "read" else 1)
    count = total_bytes // block_bytes
    options = {
        "name": "moves",
        "filename": str(folder / "fio.data"),
        "rw": f"rand{verb}" if order == "random" else verb,
        "bs": size,
        "size": size * count,
        "ioengine": "libaio",
        "iodepth": min(depth, count),
        "direct": 1,
        "overwrite": 1,
        "output-format": "json",
    }
    if verb == "write":
        options |= {"fdatasync": max(1, WRITE_BYTES // block_bytes), "end_fsync": 1}
    command = ["fio", *(f"--{name}={value}" for name, value in options.items())]

    def run() -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if job["error"]:
            raise RuntimeError(f"fio: error {job['error']}")
        return {"_seconds": total_bytes / job[verb]["bw_bytes"] * size / block_bytes}

    return run


def rates(samples: dict[str, Samples], total_bytes: int) -> dict[str, Any]:
    """What was measured, with GB/s of payload."""
    return {
        name: {**one.as_dict(), "gb_per_s": round(total_bytes / one.median_s / 1e9, 2)}
        for name, one in samples.items()
    }


def memory_entry(block_bytes: int, total_bytes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both directions between pool and arena, and memcpy."""
    rounds = 1 if args.quick else 4
    tiers = Tiers(block_bytes, total_bytes // block_bytes)
    systems = {link: _runner(tiers, link, rounds) for link in list(LINKS)[:2]}
    systems["memcpy"] = memcpy(total_bytes, rounds)
    samples = alternate(systems, args.repeats, quiet_s=args.quiet_s)
    tiers.mover.close()
    base = samples["memcpy"].median_s
    ratios = {link: round(base / samples[link].median_s, 3) for link in list(LINKS)[:2]}
    return {"systems": rates(samples, total_bytes), "share_of_memcpy": ratios}


def nvme_entry(
    block_bytes: int, total_bytes: int, order: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Both directions between arena and store, and fio."""
    count, links = total_bytes // block_bytes, list(LINKS)[2:]
    with opened(args.folder, block_bytes, count) as store:
        tiers = Tiers(block_bytes, count, store, order)
        systems = {link: _runner(tiers, link) for link in links}
        if args.has_fio:
            systems["fio write"] = fio(args.folder, block_bytes, total_bytes, "write", order)
            systems["fio read"] = fio(args.folder, block_bytes, total_bytes, "read", order)
        samples = alternate(systems, args.repeats, quiet_s=args.quiet_s)
        tiers.mover.close()
    entry: dict[str, Any] = {"systems": rates(samples, total_bytes)}
    if args.has_fio:
        pairs = zip(links, ("fio write", "fio read"), strict=True)
        entry["share_of_fio"] = {
            link: round(samples[base].median_s / samples[link].median_s, 3) for link, base in pairs
        }
    return entry


def _runner(tiers: Tiers, link: str, rounds: int = 1) -> Run:
    return lambda: tiers.run(link, rounds)


def sweep(total_bytes: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """GB/s of each link by bytes in flight, medians of alternating runs."""
    limits = [SWEPT_BYTES << n for n in range(0, 10, 5 if args.quick else 1)]
    count = total_bytes // SWEPT_BYTES
    rows: dict[str, dict[str, float]] = {}
    with opened(args.folder, SWEPT_BYTES, count) as store:
        tiers = Tiers(SWEPT_BYTES, count, store)
        for link in LINKS:
            systems: dict[str, Run] = {
                str(limit): lambda link=link, limit=limit: tiers.run(link, 1, limit)  # type: ignore[misc]
                for limit in limits
            }
            samples = alternate(systems, args.repeats, quiet_s=args.quiet_s)
            measured = rates(samples, total_bytes)
            rows[link] = {limit: measured[limit]["gb_per_s"] for limit in systems}
        tiers.mover.close()
    return rows


def plot(target: Path, rows: dict[str, dict[str, float]]) -> None:
    """GB/s over bytes in flight."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=100)
    for link, by_limit in rows.items():
        sizes = [int(limit) / MIB for limit in by_limit]
        axes.plot(sizes, list(by_limit.values()), marker="o", label=link)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    title = f"Moves of {SWEPT_BYTES // KIB} KiB blocks"
    axes.set(xlabel="MiB in flight", ylabel="GB/s", title=title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    plt.close(figure)


def show(kind: str, base: str, entries: dict[str, Any], targets: dict[int, float]) -> None:
    """One table of GB/s, and shares of the baseline where there is one."""
    rows: list[list[object]] = []
    for size, entry in entries.items():
        for name, figures in entry["systems"].items():
            share = entry.get(f"share_of_{base}", {}).get(name)
            cells = ["", ""] if share is None else [f"{share:.0%}", f"{targets[int(size)]:.0%}"]
            rows.append([f"{name}, {int(size) // KIB} KiB", figures["gb_per_s"], *cells])
    print_table([kind, "GB/s", f"of {base}", "target"], rows)
    print()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=7)
    options.add_argument("--folder", type=Path, default=cache_dir(), help="where the store goes")
    args = parse(options, argv)
    args.has_fio = shutil.which("fio") is not None
    total_bytes = 8 * MIB if args.quick else 256 * MIB
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = Path(folder)
        memory = {str(size): memory_entry(size, total_bytes, args) for size in BLOCK_BYTES}
        show("memory", "memcpy", memory, TARGETS)
        nvme = {
            order: {str(size): nvme_entry(size, total_bytes, order, args) for size in BLOCK_BYTES}
            for order in ORDERS
        }
        for order, entries in nvme.items():
            show(f"NVMe, {order}", "fio", entries, dict.fromkeys(BLOCK_BYTES, TARGET_NVME))
        if not args.has_fio:
            print("fio is not installed (Debian package fio): NVMe figures have no baseline")
        swept = sweep(total_bytes, args)
    if args.out is not None:
        plot(args.out / "moves.png", swept)
    result = {
        "total_bytes": total_bytes,
        "targets_memory": {str(size): target for size, target in TARGETS.items()},
        "target_nvme": TARGET_NVME,
        "has_fio": args.has_fio,
        "memory": memory,
        "nvme": nvme,
        "sweep_gb_per_s": swept,
    }
    return write(args.out, "moves", result)


if __name__ == "__main__":
    main()
