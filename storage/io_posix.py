"""The I/O engine for ordinary files: preadv and pwritev, past the page cache where that works.

When it opens it finds out once what the file system can do, says so in one log line, and falls
back: O_DIRECT or buffered, preallocated or sparse (then a full disk shows when a block is written).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tierkv.storage.io import MAX_VECTORS, IoQueue, aligned, rest_of
from tierkv.storage.io_aio import KernelQueue
from tierkv.storage.record import ALIGNMENT

logger = logging.getLogger(__name__)

_NOT_OFFERED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class PosixIo:
    """An `IoEngine` on a file descriptor.

    Args:
        path: the file; made with mode 0600.
        num_bytes: its size from now on.
        direct: try O_DIRECT.

    Raises:
        OSError: the file cannot be opened or the disk has no room for it.
    """

    def __init__(self, path: Path, num_bytes: int, direct: bool = True) -> None:
        self._fd, self.is_direct = _open(path, direct)
        try:
            is_allocated = self._resize(num_bytes)
            if self.is_direct and not self._can_read():
                buffered, self.is_direct = _open(path, direct=False)
                os.close(self._fd)
                self._fd = buffered
        except OSError:
            os.close(self._fd)
            raise
        how = "O_DIRECT" if self.is_direct else "buffered"
        room = "preallocated" if is_allocated else "sparse (no fallocate here)"
        logger.info("%s: %s, %d MiB %s", path, how, num_bytes >> 20, room)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        total = 0
        rest = list(buffers)
        while rest:
            count = os.preadv(self._fd, rest[:MAX_VECTORS], offset + total)
            total += count
            if count == 0 or (self.is_direct and count % ALIGNMENT):
                break  # the file ends here
            rest = rest_of(rest, count)
        return total

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        rest = list(buffers)
        while rest:
            count = os.pwritev(self._fd, rest[:MAX_VECTORS], offset)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            offset += count
            rest = rest_of(rest, count)

    def sync(self) -> None:
        os.fdatasync(self._fd)
        if os.fstat(self._fd).st_nlink == 0:
            raise OSError(errno.ESTALE, "the file was deleted")

    def open_queue(self, depth: int) -> IoQueue | None:
        """The kernel's own, unless it would only wait in it (buffered), or has none to give."""
        try:
            return KernelQueue(self, self._fd, depth) if self.is_direct else None
        except OSError as error:
            logger.info("no asynchronous I/O (%s): threads wait for each operation", error)
            return None

    def close(self) -> None:
        os.close(self._fd)

    def _resize(self, num_bytes: int) -> bool:
        """Give the file its size; returns whether its blocks are allocated."""
        before = os.fstat(self._fd).st_size
        os.ftruncate(self._fd, num_bytes)
        if not can_allocate(self._fd):
            return False
        try:
            os.posix_fallocate(self._fd, 0, num_bytes)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                os.ftruncate(self._fd, min(before, num_bytes))  # or what it got fills the disk
                raise
            return False
        return True

    def _can_read(self) -> bool:
        try:
            os.preadv(self._fd, [aligned(ALIGNMENT)], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True


def can_allocate(descriptor: int) -> bool:
    """Whether the file system allocates blocks by itself.

    Where it does not, glibc's `posix_fallocate` writes a byte into every block: hours for a large
    file on a slow disk. The first block is allocated to find out.
    """
    if _libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(ALIGNMENT)) == 0:
        return True
    return ctypes.get_errno() not in _NOT_OFFERED


_libc = ctypes.CDLL(None, use_errno=True)


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o600), False
