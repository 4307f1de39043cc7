"""The seam between a store and its file, and the aligned memory that direct I/O asks for."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from tierkv.storage.record import ALIGNMENT

MAX_VECTORS = 1024
"""Buffers per system call (IOV_MAX on Linux)."""


class IoEngine(Protocol):
    """One open file. Every method may be called from any thread; failures are OSErrors.

    Attributes:
        is_direct: buffers must start at a multiple of 4 KiB. Sizes and offsets always are one.
    """

    @property
    def is_direct(self) -> bool: ...

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill the buffers from the file; returns fewer bytes only where the file ends."""
        ...

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all of the buffers, or raise."""
        ...

    def sync(self) -> None:
        """Returns when every write that returned before is durable."""
        ...

    def close(self) -> None: ...


class Operation(NamedTuple):
    """One read or write of adjacent bytes of the file.

    Attributes:
        number: names it in the queue; below the queue's depth, and of no other one in flight.
        is_write: or else a read into the buffers.
        buffers: kept by the caller, a write's unchanged, until the operation is completed.
        offset, num_bytes: where in the file, and the size of all buffers.
    """

    number: int
    is_write: bool
    buffers: Sequence[memoryview]
    offset: int
    num_bytes: int


Completed = tuple[int, int | OSError]
"""An operation's number, and the bytes that it moved (fewer only where the file ends)."""


class IoQueue(Protocol):
    """Operations in flight, in no order, for one caller at a time."""

    def begin(self, operations: Sequence[Operation]) -> None:
        """Start them, or raise and start none; may wait for the device to take them."""
        ...

    def completed(self, at_least: int) -> list[Completed]:
        """Those that ended since the last call; waits until `at_least` did."""
        ...

    def close(self) -> None:
        """Nothing is in flight any more."""
        ...


def perform(io: IoEngine, operation: Operation) -> Completed:
    """Do it now."""
    number, is_write, buffers, offset, num_bytes = operation
    try:
        if not is_write:
            return number, io.preadv(buffers, offset)
        io.pwritev(buffers, offset)
        return number, num_bytes
    except OSError as error:
        return number, error


OpenIo = Callable[[Path, int], IoEngine]
"""Opens or makes the file of a store with room for a number of bytes; raises OSError."""


def rest_of(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers after their first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer.cast("B")[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []


def aligned(num_bytes: int) -> memoryview:
    """New memory, zeros, starting at a page boundary."""
    return memoryview(mmap.mmap(-1, max(num_bytes, 1)))[:num_bytes]


def address_of(buffer: memoryview) -> int:
    """Where the buffer's memory is, as long as somebody keeps it."""
    if not buffer.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    address: int = as_array(buffer).__array_interface__["data"][0]
    return address


def is_aligned(buffer: memoryview) -> bool:
    """Whether direct I/O may use the buffer in place."""
    return address_of(buffer) % ALIGNMENT == 0 and buffer.nbytes % ALIGNMENT == 0


def as_array(buffer: memoryview) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The buffer's bytes as an array, not copied."""
    return np.frombuffer(buffer, dtype=np.uint8)


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes of equal number without holding the interpreter lock."""
    np.copyto(as_array(target), as_array(source))
