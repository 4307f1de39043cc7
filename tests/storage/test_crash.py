"""After kill -9 or power loss at any moment: nothing acknowledged lost, nothing wrong served."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_blocks import PAYLOAD_BYTES, open_nvme
from store_ledger import Ledger, work

from tierkv.storage.base import BlockStore
from tierkv.storage.faults import CrashIo
from tierkv.storage.io import IoEngine
from tierkv.storage.io_posix import PosixIo

CAPACITY = 24
SUPPORT = Path(__file__).parent.parent / "support"


class Nursery:
    """A process that forks writers and kills each at a random moment."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SUPPORT / "store_victim.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, path: Path, log: Path, seed: int) -> str:
        """One life; returns how it ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(path, log, CAPACITY, seed, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one: these tests sync thousands of times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def kill_often(nursery: Nursery, folder: Path, num_kills: int, seed: int) -> None:
    chance = random.Random(seed)
    store_path, log = folder / "store", folder / "log"
    ledger, num_lines, num_right = Ledger(CAPACITY), 0, 0
    for life in range(num_kills):
        assert nursery.run(store_path, log, chance.randrange(1 << 30)) == "killed"
        if chance.random() < 0.3 or not log.exists():
            continue  # the next one recovers, and is killed too
        lines = log.read_text().splitlines()
        ledger.replay(lines[num_lines:])
        num_lines = len(lines)
        store = open_nvme(store_path, CAPACITY)
        try:
            num_right += ledger.check(store)
        except AssertionError as error:
            history = "\n".join(lines[-100:])
            raise AssertionError(f"kill {life}, seed {seed}: {error}\n{history}") from error
        finally:
            store.close()
    assert num_right > num_kills
    assert num_lines > 2 * num_kills


def test_kill_9(nursery: Nursery, folder: Path) -> None:
    kill_often(nursery, folder, num_kills=200, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_kill_9_in_full(nursery: Nursery, folder: Path, seed: int) -> None:
    kill_often(nursery, folder, num_kills=200, seed=100 + seed)


class PowerLoss:
    """Makes engines that take a clone of the directory when the n-th write or sync begins."""

    def __init__(self, target: Path, seed: int, countdown: int) -> None:
        self.target, self.seed, self.countdown = target, seed, countdown
        self.has_happened = False

    def open_io(self, path: Path, num_bytes: int) -> IoEngine:
        return DoomedIo(PosixIo(path, num_bytes), path, self)

    def tick(self, io: CrashIo) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            io.clone(self.target, self.seed)
            self.has_happened = True


class DoomedIo(CrashIo):
    def __init__(self, inner: IoEngine, path: Path, loss: PowerLoss) -> None:
        super().__init__(inner, path)
        self._loss = loss

    def pwritev(self, buffers: list[memoryview], offset: int) -> None:  # type: ignore[override]
        super().pwritev(buffers, offset)
        self._loss.tick(self)

    def sync(self) -> None:
        self._loss.tick(self)
        super().sync()
        self._loss.tick(self)


def work_until(loss: PowerLoss, store: BlockStore, ledger: Ledger, chance: random.Random) -> None:
    """Operations until the power is lost; the ledger knows what was promised by then."""

    def log(line: str) -> None:
        if not loss.has_happened:
            ledger.note(line)

    while not loss.has_happened:
        work(store, chance, range(CAPACITY), log)


def lose_power(folder: Path, seed: int) -> int:
    """Lose power twice, the second time perhaps while recovering from the first."""
    chance = random.Random(seed)
    ledger = Ledger(CAPACITY)
    path = folder / "store0"
    for life in range(2):
        target = folder / f"store{life + 1}"
        # the first events of the second life belong to its recovery
        loss = PowerLoss(target, seed + life, chance.randint(1, 60 if life == 0 else 12))
        store = open_nvme(path, CAPACITY, open_io=loss.open_io)
        work_until(loss, store, ledger, chance)
        store.close()
        path = target
    store = open_nvme(path, CAPACITY)
    num_right = ledger.check(store)
    store.close()
    again = open_nvme(path, CAPACITY)
    assert ledger.check(again) == num_right
    again.close()
    return num_right


def lose_power_often(folder: Path, seeds: range) -> None:
    num_right = 0
    for seed in seeds:
        try:
            num_right += lose_power(folder / str(seed), seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert num_right > len(seeds) * CAPACITY // 4


def test_power_loss(folder: Path) -> None:
    lose_power_often(folder, range(300))


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_power_loss_in_full(folder: Path, part: int) -> None:
    lose_power_often(folder, range(1000 + 500 * part, 1500 + 500 * part))


def test_a_clone_can_lose_what_was_not_synced(tmp_path: Path) -> None:
    path = tmp_path / "store" / "blocks.data"
    path.parent.mkdir()
    io = CrashIo(PosixIo(path, 4 * PAYLOAD_BYTES, direct=False), path)
    kept, doubtful = memoryview(b"k" * 4096), memoryview(b"d" * 4096)
    io.pwritev([kept], 0)
    io.sync()
    io.pwritev([doubtful], 4096)
    seen = set()
    for seed in range(20):
        io.clone(tmp_path / str(seed), seed)
        image = (tmp_path / str(seed) / "blocks.data").read_bytes()
        assert image[:4096] == kept
        seen.add(image[4096:8192].count(b"d") // 512)
    assert {0, 8} < seen
    io.close()
