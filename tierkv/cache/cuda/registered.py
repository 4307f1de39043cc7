"""Host memory that a GPU copies from and to by itself, registered piece by piece.

Registering takes the memory from the system and locks its pages: seconds for tens of GB, minutes
for hundreds. So it goes on in the background while requests are served already, from the first
slot up. Slots that are not registered yet, or never, because the system has no more such memory,
are copied through a small buffer (`lanes.py`).

A piece is a number of whole slots. One copy may not cross the border of two registrations, even if
they are neighbours.

CUDA keeps a refusal in mind for the thread that met it, and torch takes it for its own next error
there; so nothing is registered in a thread that launches kernels.
"""

from __future__ import annotations

import logging
import threading

from tierkv.cache.cuda.streams import Device
from tierkv.cache.links import Memory
from tierkv.errors import DeviceError
from tierkv.storage.arena import HostArena

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 30

_REFUSED = (
    "%d of %d bytes of %s are page-locked; the others are copied through a buffer, which is slower"
    " (%s). Lower cpu_cache_size, or raise the limit of locked memory (ulimit -l)"
)


class RegisteredMemory(Memory):
    """Blocks in host memory, registered with a device as far as it goes.

    Args:
        device: registers.
        arena: the memory.
        name: what it is, for the log; None if the owner tells of a refusal.
        piece_bytes: most bytes of one registration; at least one slot is.

    Attributes:
        num_registered: slots from 0 on that the device reads and writes by itself.
        refusal: why the rest is not registered, once the system has refused.
    """

    def __init__(
        self,
        device: Device,
        arena: HostArena,
        name: str | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(arena.array, arena.block_bytes)
        self.num_registered = 0
        self.refusal: OSError | DeviceError | None = None
        self._device, self._arena, self._name = device, arena, name
        self._piece_slots = slots_of_a_piece(piece_bytes, arena.stride)
        self._pieces: list[int] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._register, name="tierkv-register", daemon=True)

    @property
    def num_slots(self) -> int:
        return self._arena.num_slots

    def is_registered(self, slot: int) -> bool:
        return slot < self.num_registered

    def start(self) -> None:
        """Begin to register, in the background."""
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether registering has ended, or was never begun, after at most that long."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self, timeout_s: float | None = None) -> None:
        """Unregister; no copy uses the memory any more. A registration that is under way after
        that long is given back when it has ended."""
        self._is_closed = True
        if self.wait(timeout_s):
            self._give_back()
        else:
            logger.warning("registering host memory is stuck; the end does not wait for it")

    def _register(self) -> None:
        while self.num_registered < self.num_slots and not self._is_closed:
            count = min(self._piece_slots, self.num_slots - self.num_registered)
            address = self._arena.address + self.num_registered * self._arena.stride
            try:
                self._device.register(address, count * self._arena.stride)
            except (OSError, DeviceError) as error:
                self._refuse(error)
                break
            self._pieces.append(address)
            self.num_registered += count
        if self._is_closed:
            self._give_back()

    def _give_back(self) -> None:
        pieces, self._pieces, self.num_registered = self._pieces, [], 0
        for address in pieces:
            try:
                self._device.unregister(address)
            except DeviceError as error:
                logger.info("%d pieces of host memory stay registered: %s", len(pieces), error)
                return

    def _refuse(self, error: OSError | DeviceError) -> None:
        self.refusal = error
        if self._name is not None:
            locked, size = self.num_registered * self._arena.stride, self._arena.num_bytes
            logger.warning(_REFUSED, locked, size, self._name, error)


def slots_of_a_piece(piece_bytes: int, stride: int) -> int:
    """Whole slots, so that none crosses a border."""
    return max(1, piece_bytes // stride)
