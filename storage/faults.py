"""Sick devices on demand, from a seed: for tests and simulation.

FaultyStore   wraps a BlockStore: answers as a store on a sick device would
FaultyIo      wraps an IoEngine: a sick device, to see what the store above makes of it
CrashIo       wraps an IoEngine: knows what is durable, and makes the directory as it would be
              after power loss at this moment
"""

from __future__ import annotations

import enum
import errno
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tierkv.storage.base import (
    BlockStore,
    Cause,
    Done,
    Failure,
    Outcome,
    SlotRead,
    SlotWrite,
    StoredBlock,
)
from tierkv.storage.index import INDEX_NAME, remove_index
from tierkv.storage.io import IoEngine
from tierkv.storage.lock import LOCK_NAME
from tierkv.storage.wrapper import StoreWrapper

SECTOR_BYTES = 512
"""What a device writes at once."""


class Fault(enum.Enum):
    """What can go wrong with one operation."""

    ERROR = "error"
    SHORT_READ = "short read"
    BIT_FLIP = "bit flip"
    TORN_WRITE = "torn write"  # part of it is written, and all of it is reported
    STALL = "stall"
    NO_SPACE = "no space"


READ_FAULTS = (Fault.ERROR, Fault.SHORT_READ, Fault.BIT_FLIP, Fault.STALL)
WRITE_FAULTS = (Fault.ERROR, Fault.NO_SPACE, Fault.TORN_WRITE, Fault.STALL)
SYNC_FAULTS = (Fault.ERROR, Fault.STALL)

_CAUSES = {
    Fault.ERROR: Cause.IO_ERROR,
    Fault.SHORT_READ: Cause.SHORT_READ,
    Fault.BIT_FLIP: Cause.CORRUPT,
    Fault.STALL: Cause.LATE,
    Fault.NO_SPACE: Cause.NO_SPACE,
}


class FaultPlan:
    """Which operation gets which fault.

    Args:
        script: by the operation's number (from 0; every read, write and sync counts).
        rates: probability of each fault, for operations that the script does not name.
        seed: of the probabilities, and of where bits flip and writes tear.
        stall_s: how long a stall takes.
        sleep: how to wait.

    Attributes:
        injected: how often each fault happened.
    """

    def __init__(
        self,
        script: Mapping[int, Fault] | None = None,
        rates: Mapping[Fault, float] | None = None,
        seed: int = 0,
        stall_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._script, self._rates = dict(script or {}), dict(rates or {})
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._stall_s, self._sleep = stall_s, sleep
        self._num_operations = 0
        self.injected: Counter[Fault] = Counter()

    def next(self, possible: Sequence[Fault]) -> Fault | None:
        """The fault of the next operation, if any; a stall has been waited for."""
        with self._lock:
            fault = self._script.get(self._num_operations)
            self._num_operations += 1
            if fault is None:
                rates = [self._rates.get(kind, 0.0) for kind in possible]
                choice = self._random.random()
                for kind, rate in zip(possible, rates, strict=True):
                    choice -= rate
                    if choice < 0:
                        fault = kind
                        break
            if fault is None or fault not in possible:
                return None
            self.injected[fault] += 1
        if fault is Fault.STALL:
            self._sleep(self._stall_s)
        return fault

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        with self._lock:
            return self._random.randrange(bound)


class FaultyIo:
    """An `IoEngine` on a sick device."""

    def __init__(self, inner: IoEngine, plan: FaultPlan) -> None:
        self._inner, self._plan = inner, plan

    @property
    def is_direct(self) -> bool:
        return self._inner.is_direct

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        fault = self._plan.next(READ_FAULTS)
        if fault is Fault.ERROR:
            raise OSError(errno.EIO, "injected")
        count = self._inner.preadv(buffers, offset)
        if fault is Fault.SHORT_READ:
            return self._plan.below(count) if count else 0
        if fault is Fault.BIT_FLIP:
            buffer = buffers[self._plan.below(len(buffers))].cast("B")
            buffer[self._plan.below(len(buffer))] ^= 1 << self._plan.below(8)
        return count

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        fault = self._plan.next(WRITE_FAULTS)
        if fault in (Fault.ERROR, Fault.NO_SPACE):
            raise OSError(errno.EIO if fault is Fault.ERROR else errno.ENOSPC, "injected")
        if fault is not Fault.TORN_WRITE:
            self._inner.pwritev(buffers, offset)
            return
        for buffer in buffers:
            if self._plan.below(2):
                self._inner.pwritev([buffer], offset)
            offset += buffer.nbytes

    def sync(self) -> None:
        if self._plan.next(SYNC_FAULTS) is Fault.ERROR:
            raise OSError(errno.EIO, "injected")
        self._inner.sync()

    def close(self) -> None:
        self._inner.close()


class FaultyStore(StoreWrapper):
    """A `BlockStore` that answers as one on a sick device would. Erasing always works."""

    def __init__(self, inner: BlockStore, plan: FaultPlan) -> None:
        super().__init__(inner)
        self._plan = plan
        self._lost: dict[int, Cause] = {}
        """Slots whose last write failed (NOT_FOUND) or tore (CORRUPT)."""

    def write(self, batch: Sequence[SlotWrite]) -> list[Outcome]:
        return [self._written(w, o) for w, o in zip(batch, self._inner.write(batch), strict=True)]

    def read(self, batch: Sequence[SlotRead]) -> list[Outcome]:
        return [self._seen(r, o) for r, o in zip(batch, self._inner.read(batch), strict=True)]

    def erase(self, slots: Sequence[int]) -> list[Outcome]:
        for slot in slots:
            self._lost.pop(slot, None)
        return self._inner.erase(slots)

    def recover(self) -> list[StoredBlock]:
        return [b for b in self._inner.recover() if self._lost.get(b.slot) != Cause.NOT_FOUND]

    def _written(self, write: SlotWrite, outcome: Outcome) -> Outcome:
        self._lost.pop(write.slot, None)
        fault = self._plan.next(WRITE_FAULTS)
        if fault is Fault.TORN_WRITE:
            self._lost[write.slot] = Cause.CORRUPT
        elif fault is not None and isinstance(outcome, Done):
            self._lost[write.slot] = Cause.NOT_FOUND
            return Failure(_CAUSES[fault], "injected")
        return outcome

    def _seen(self, read: SlotRead, outcome: Outcome) -> Outcome:
        fault = self._plan.next(READ_FAULTS)
        cause = self._lost.get(read.slot) or (_CAUSES[fault] if fault else None)
        if cause is None or not isinstance(outcome, Done):
            return outcome
        read.out.cast("B")[:1] = bytes([read.out.cast("B")[0] ^ 1])
        return Failure(cause, "injected")


class CrashIo:
    """An `IoEngine` that keeps apart what a power loss could take away.

    Args:
        inner: the real engine, on `path`.
        path: the file.
    """

    def __init__(self, inner: IoEngine, path: Path) -> None:
        self._inner, self._path = inner, path
        self._lock = threading.Lock()
        self._durable = bytearray(path.read_bytes())
        self._unsynced: dict[int, tuple[int, bytes]] = {}
        self._returned: set[int] = set()
        self._num_writes = 0

    @property
    def is_direct(self) -> bool:
        return self._inner.is_direct

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        return self._inner.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._lock:
            number = self._num_writes
            self._num_writes += 1
            self._unsynced[number] = (offset, b"".join(buffers))
        self._inner.pwritev(buffers, offset)
        with self._lock:
            self._returned.add(number)

    def sync(self) -> None:
        with self._lock:
            covered, self._returned = sorted(self._returned), set()
        self._inner.sync()
        with self._lock:
            for number in covered:
                offset, data = self._unsynced.pop(number)
                self._durable[offset : offset + len(data)] = data

    def close(self) -> None:
        self._inner.close()

    def clone(self, target: Path, seed: int) -> None:
        """Make `target` the directory as after power loss now.

        Of each write that was not synced, all, none or some sectors are there. The index is as it
        is, gone, or garbage.
        """
        chance = random.Random(seed)
        ignored = shutil.ignore_patterns(self._path.name, LOCK_NAME)
        shutil.copytree(self._path.parent, target, ignore=ignored)
        with self._lock:
            image, pending = bytearray(self._durable), list(self._unsynced.values())
        for offset, data in pending:
            kept = chance.choice((0.0, 0.5, 0.9, 1.0))
            for start in range(0, len(data), SECTOR_BYTES):
                if chance.random() < kept:
                    part = data[start : start + SECTOR_BYTES]
                    image[offset + start : offset + start + len(part)] = part
        (target / self._path.name).write_bytes(image)
        fate = chance.choice(("intact", "gone", "garbage"))
        if fate != "intact":
            remove_index(target)
        if fate == "garbage":
            (target / INDEX_NAME).write_bytes(chance.randbytes(8192))
