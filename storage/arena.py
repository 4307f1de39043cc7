"""The CPU tier's memory: one page-aligned allocation, one slot per block, 4 KiB aligned.

One range means that it can be registered with a GPU driver once, that adjacent slots are one copy,
and that a slot can go to a file without being copied first.
"""

from __future__ import annotations

import mmap

import numpy as np

from tierkv.errors import ConfigError
from tierkv.storage.io import as_array
from tierkv.storage.record import padded


class HostArena:
    """Slots of host memory, zeros at first; taken from the system when they are first written.

    Args:
        num_slots: how many blocks fit.
        block_bytes: bytes of one.

    Attributes:
        stride: bytes from one slot to the next.
        array: all of it, uint8 `[num_slots, stride]`.

    Raises:
        ConfigError: the system has no such memory.
    """

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        self.num_slots, self.block_bytes = num_slots, block_bytes
        self.stride = padded(block_bytes)
        try:
            memory = mmap.mmap(-1, num_slots * self.stride)
        except (OSError, ValueError, OverflowError) as error:
            size = num_slots * self.stride
            raise ConfigError("cpu_cache_size", size, f"cannot be allocated ({error})") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(memory)
        self.array = as_array(self._view).reshape(num_slots, self.stride)

    @property
    def address(self) -> int:
        """Where the memory starts."""
        address: int = self.array.__array_interface__["data"][0]
        return address

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.stride

    def view(self, slot: int) -> memoryview:
        """The block in a slot, without the padding."""
        return self._view[slot * self.stride :][: self.block_bytes]

    def numpy(self, first: int, count: int = 1) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """Adjacent slots as an array `[count, block_bytes]`, not copied."""
        return self.array[first : first + count, : self.block_bytes]
