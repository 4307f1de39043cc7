"""The way of blocks between the pool on a GPU and host memory, for one thread and one direction.

    large block, registered slot   one copy by the GPU's copy engine, many in one call
    large block, other slot        the same, to or from a buffer; the CPU copies on
    small block                    a kernel gathers many into a buffer on the GPU, one copy brings
                                   them to a buffer of the host, the CPU copies on; or the reverse

A copy reads and writes at some moment after it was issued. It is made to wait for what the compute
stream had been given when its move began: the forward that wrote the block, or the last one that
read what was in its slot before. Its own event says when it is done; nothing that it uses is given
to others before.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tierkv.cache.cuda.registered import RegisteredMemory
from tierkv.cache.cuda.streams import Device, Event
from tierkv.cache.links import Memory, copy_rows
from tierkv.errors import ConfigError, DeviceError
from tierkv.storage.arena import HostArena
from tierkv.types import Move


@dataclass(frozen=True, slots=True)
class LaneSizes:
    """How a lane copies.

    Attributes:
        direct_bytes: blocks of this size and above are one copy each; smaller ones are gathered.
        buffer_bytes: of one buffer.
        num_buffers: as many copies through buffers are under way at once.
    """

    direct_bytes: int = 256 << 10
    buffer_bytes: int = 4 << 20
    num_buffers: int = 2


Marks = dict[int, Event]
"""By the tickets of moves that have begun and whose results were not polled: an event behind all
that the compute stream had been given when the move began."""


@dataclass(frozen=True, slots=True)
class Part:
    """Moves that are issued together: all through one buffer, or none.

    Attributes:
        slots: of `memory`, one for each move.
    """

    moves: list[Move]
    memory: RegisteredMemory
    slots: list[int]
    is_direct: bool


class Buffer:
    """Memory for some blocks on the host, registered, and on the device if they are small.

    Attributes:
        host: uint8 `[num_slots, block_bytes]` without gaps.
        on_device: the same on the device; None where each block is a copy.
    """

    def __init__(self, device: Device, num_slots: int, block_bytes: int, is_small: bool) -> None:
        self._arena = HostArena(1, num_slots * block_bytes)
        self._registered = RegisteredMemory(device, self._arena)
        self._registered.start()
        self._registered.wait()
        reason = self._registered.refusal
        if isinstance(reason, DeviceError):
            raise reason
        if reason is not None:
            size = self._arena.num_bytes
            fix = f"needs {size} bytes of page-locked memory ({reason}); raise ulimit -l"
            raise ConfigError("offload", "from a GPU", fix)
        flat = self._arena.array[0, : num_slots * block_bytes]
        self.host = Memory(flat.reshape(num_slots, block_bytes), block_bytes)
        self.on_device = device.empty(num_slots, block_bytes) if is_small else None

    def close(self) -> None:
        self._registered.close()


@dataclass(slots=True)
class Transfer:
    """A part under way: `start` and `end` are events around its copies; `host_s` is what the CPU
    took for its own."""

    part: Part
    buffer: Buffer | None
    start: Event
    end: Event
    host_s: float


class Lane:
    """Issues copies on a stream of its own and waits for them; see `DownLane` and `UpLane`.

    Args:
        device: of the pool.
        pool: uint8 `[num_blocks, block_bytes]` on the device.
        marks: see `Marks`.
        sizes: how to copy.
    """

    def __init__(self, device: Device, pool: Tensor, marks: Marks, sizes: LaneSizes) -> None:
        self._device, self._pool, self._marks = device, pool, marks
        self._stream = device.new_stream()
        block_bytes = pool.shape[1]
        self._is_small = block_bytes < sizes.direct_bytes
        self._buffer_slots = max(1, sizes.buffer_bytes // block_bytes)
        self._buffers: list[Buffer] = []
        try:
            for _ in range(sizes.num_buffers):
                buffer = Buffer(device, self._buffer_slots, block_bytes, self._is_small)
                self._buffers.append(buffer)
        except BaseException:
            self.close()
            raise
        self._idle = list(self._buffers)

    def close(self) -> None:
        """Unregister the buffers; nothing is under way."""
        for buffer in self._buffers:
            buffer.close()

    def parts(
        self, moves: list[Move], memory: RegisteredMemory, slots: list[int]
    ) -> Iterator[Part]:
        """The moves, in order, in parts that can be issued.

        Raises:
            IndexError: a slot that does not exist.
        """
        _check(self._places(moves), self._pool.shape[0])
        _check(slots, memory.num_slots)
        pairs = zip(moves, slots, strict=True)
        runs = itertools.groupby(
            pairs, lambda pair: not self._is_small and memory.is_registered(pair[1])
        )
        for is_direct, run in runs:
            rest = list(run)
            most = len(rest) if is_direct else self._buffer_slots
            for first in range(0, len(rest), most):
                some = rest[first : first + most]
                yield Part([m for m, _ in some], memory, [slot for _, slot in some], is_direct)

    def can_start(self, part: Part) -> bool:
        """Whether there is a buffer, if it needs one."""
        return part.is_direct or bool(self._idle)

    def start(self, part: Part) -> Transfer:
        """Issue the part's copies."""
        buffer, start_s = None, time.perf_counter()
        if not part.is_direct:
            buffer = self._idle.pop()
            self._fill(part, buffer)
        host_s = time.perf_counter() - start_s
        begun = [self._marks[move.ticket] for move in part.moves]
        for event in dict.fromkeys(begun):
            self._device.wait(self._stream, event)
        start = self._device.record(self._stream)
        self._issue(part, buffer)
        return Transfer(part, buffer, start, self._device.record(self._stream), host_s)

    def finish(self, transfer: Transfer) -> float:
        """Return when the bytes are where they belong.

        Returns:
            Seconds of the copies: the device's or the CPU's, whichever are more, because those of
            many parts overlap.
        """
        self._device.synchronize(transfer.end)
        start_s = time.perf_counter()
        if transfer.buffer is not None:
            self._empty(transfer.part, transfer.buffer)
            self._idle.append(transfer.buffer)
        host_s = transfer.host_s + time.perf_counter() - start_s
        return max(host_s, self._device.seconds_between(transfer.start, transfer.end))

    def copy(self, moves: list[Move], memory: Memory, slots: list[int]) -> None:
        """All of them; returns when the bytes are there."""
        assert isinstance(memory, RegisteredMemory)
        running: deque[Transfer] = deque()
        for part in self.parts(moves, memory, slots):
            if not self.can_start(part):
                self.finish(running.popleft())
            running.append(self.start(part))
        for transfer in running:
            self.finish(transfer)

    # ------------------------------------------------------------------ of each direction

    def _places(self, moves: list[Move]) -> list[int]:
        """Blocks of the pool."""
        raise NotImplementedError

    def _fill(self, part: Part, buffer: Buffer) -> None:
        """Before the copies are issued."""

    def _issue(self, part: Part, buffer: Buffer | None) -> None:
        raise NotImplementedError

    def _empty(self, part: Part, buffer: Buffer) -> None:
        """After the copies are done."""


class DownLane(Lane):
    """From the pool to host memory."""

    def _places(self, moves: list[Move]) -> list[int]:
        return [move.source_slot for move in moves]

    def _issue(self, part: Part, buffer: Buffer | None) -> None:
        device, stream, froms = self._device, self._stream, self._places(part.moves)
        if buffer is None:
            device.to_host(stream, self._pool, froms, part.memory.rows, part.slots)
        elif buffer.on_device is None:
            device.to_host(stream, self._pool, froms, buffer.host.rows, range(len(froms)))
        else:
            packed = buffer.on_device[: len(froms)]
            device.gather(stream, self._pool, froms, packed)
            host = buffer.host.rows[: len(froms)]
            device.to_host(stream, packed.view(1, -1), [0], host.view(1, -1), [0])

    def _empty(self, part: Part, buffer: Buffer) -> None:
        copy_rows(buffer.host, list(range(len(part.slots))), part.memory, part.slots)


class UpLane(Lane):
    """From host memory into the pool."""

    def _places(self, moves: list[Move]) -> list[int]:
        return [move.destination_slot for move in moves]

    def _fill(self, part: Part, buffer: Buffer) -> None:
        copy_rows(part.memory, part.slots, buffer.host, list(range(len(part.slots))))

    def _issue(self, part: Part, buffer: Buffer | None) -> None:
        device, stream, tos = self._device, self._stream, self._places(part.moves)
        if buffer is None:
            device.to_device(stream, part.memory.rows, part.slots, self._pool, tos)
        elif buffer.on_device is None:
            device.to_device(stream, buffer.host.rows, range(len(tos)), self._pool, tos)
        else:
            packed = buffer.on_device[: len(tos)]
            host = buffer.host.rows[: len(tos)]
            device.to_device(stream, host.view(1, -1), [0], packed.view(1, -1), [0])
            device.scatter(stream, packed, self._pool, tos)


def _check(slots: Sequence[int], num_slots: int) -> None:
    for slot in slots:
        if not 0 <= slot < num_slots:
            raise IndexError(f"slot {slot} of {num_slots}")
