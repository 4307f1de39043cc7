"""The seam between a store and its file, and the aligned memory that direct I/O asks for."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from tierkv.storage.record import ALIGNMENT


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


OpenIo = Callable[[Path, int], IoEngine]
"""Opens or makes the file of a store with room for a number of bytes; raises OSError."""


def aligned(num_bytes: int) -> memoryview:
    """New memory, zeros, starting at a page boundary."""
    return memoryview(mmap.mmap(-1, max(num_bytes, 1)))[:num_bytes]


def is_aligned(buffer: memoryview) -> bool:
    """Whether direct I/O may use the buffer in place."""
    address: int = as_array(buffer).__array_interface__["data"][0]
    return address % ALIGNMENT == 0 and buffer.nbytes % ALIGNMENT == 0


def as_array(buffer: memoryview) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The buffer's bytes as an array, not copied."""
    return np.frombuffer(buffer, dtype=np.uint8)


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes of equal number without holding the interpreter lock."""
    np.copyto(as_array(target), as_array(source))
