"""One owner per directory: an exclusive flock on a file that also says who holds it."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

LOCK_NAME = "LOCK"


@dataclass(frozen=True, slots=True)
class Held:
    """Somebody else has the lock; `pid` as they wrote it ("unknown" if they did not)."""

    pid: str


class DirectoryLock:
    """A lock that is held. The kernel lets go when the process ends, however it ends.

    Children made by `fork` share it until they end; use `spawn` or close the store first.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)


def holder(directory: Path) -> str:
    """Who has the directory locked: a process number, or `nobody`. Takes nothing away."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return "nobody"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "nobody"
    except BlockingIOError:
        return _written_pid(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Take the lock; `holder` of somebody else may be in the way for a moment."""
    for pause_s in (0.01, 0.05, 0.0):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            time.sleep(pause_s)
    return False


def _written_pid(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"


def acquire(directory: Path, wait: bool = False) -> DirectoryLock | Held:
    """Lock an existing directory; the lock file's time of change is when it was locked last.

    Raises:
        OSError: the lock file cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(directory / LOCK_NAME, flags, 0o600)
    if not _lock(descriptor, wait):
        pid = _written_pid(descriptor)
        os.close(descriptor)
        return Held(pid)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return DirectoryLock(descriptor)
