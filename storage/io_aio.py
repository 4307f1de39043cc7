"""Linux's asynchronous I/O: one thread has many operations in flight, with two system calls.

    io_submit      starts operations; for files opened with O_DIRECT it does not wait for them
    io_getevents   waits for some of them to end

The system calls are made through the C library's `syscall`, which gives up the interpreter lock.
Structures are those of <linux/aio_abi.h>: struct iocb of 64 bytes, struct io_event of 32, struct
iovec of 16. (io_uring is newer, and what containers forbid by default.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections import defaultdict
from collections.abc import Sequence

from tierkv.storage.io import (
    MAX_VECTORS,
    Completed,
    IoEngine,
    Operation,
    address_of,
    aligned,
    perform,
    rest_of,
)
from tierkv.storage.record import ALIGNMENT

_NUMBERS = {
    "x86_64": {"setup": 206, "destroy": 207, "getevents": 208, "submit": 209},
    "aarch64": {"setup": 0, "destroy": 1, "submit": 2, "getevents": 4},
}
_PREADV, _PWRITEV = 7, 8
_IOCB = struct.Struct("<QIIHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_VECTOR = struct.Struct("<QQ")
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class KernelQueue:
    """An `IoQueue` of the kernel.

    Args:
        io: the file; does what the queue does not take, and the rest of what it leaves half done.
        descriptor: of the file, opened with O_DIRECT.
        depth: operations in flight at most.

    Raises:
        OSError: the system has none to give.
    """

    def __init__(self, io: IoEngine, descriptor: int, depth: int) -> None:
        self._io, self._descriptor, self._depth = io, descriptor, depth
        self._blocks = aligned(depth * _IOCB.size)
        self._vectors = aligned(depth * MAX_VECTORS * _VECTOR.size)
        self._events = aligned(depth * _EVENT.size)
        self._list = aligned(depth * 8)
        self._at = [address_of(part) for part in (self._blocks, self._vectors, self._events)]
        self._in_flight: dict[int, Operation] = {}
        self._at_once: list[Completed] = []
        self._context = _take_context(depth)

    def begin(self, operations: Sequence[Operation]) -> None:
        fitting = [op for op in operations if len(op.buffers) <= MAX_VECTORS]
        addresses = [self._encode(operation) for operation in fitting]
        struct.pack_into(f"<{len(addresses)}Q", self._list, 0, *addresses)
        try:
            num_taken = _call("submit", self._context, len(fitting), address_of(self._list))
        except OSError:
            num_taken = 0
        self._in_flight |= {operation.number: operation for operation in fitting[:num_taken]}
        for operation in operations:
            if operation.number not in self._in_flight:
                self._at_once.append(perform(self._io, operation))

    def completed(self, at_least: int) -> list[Completed]:
        ended, self._at_once = self._at_once, []
        wanted = min(at_least - len(ended), len(self._in_flight))
        if self._in_flight:
            arguments = (max(wanted, 0), self._depth, self._at[2], 0)
            count = _call("getevents", self._context, *arguments)
            for number, _, moved, _ in _EVENT.iter_unpack(self._events[: count * _EVENT.size]):
                ended.append((number, self._moved(self._in_flight.pop(number), moved)))
        return ended

    def close(self) -> None:
        _unused[self._depth].append(self._context)

    def _encode(self, operation: Operation) -> int:
        """Write the operation's structures; the address of its struct iocb."""
        number, is_write, buffers, offset, _ = operation
        start = number * MAX_VECTORS * _VECTOR.size
        words = [word for part in buffers for word in (address_of(part), part.nbytes)]
        struct.pack_into(f"<{len(words)}Q", self._vectors, start, *words)
        code = _PWRITEV if is_write else _PREADV
        where = (self._descriptor, self._at[1] + start, len(buffers), offset)
        _IOCB.pack_into(self._blocks, number * _IOCB.size, number, 0, 0, code, 0, *where, 0, 0, 0)
        return self._at[0] + number * _IOCB.size

    def _moved(self, operation: Operation, moved: int) -> int | OSError:
        """What the operation moved in the end; the rest of a short one is done now."""
        if moved < 0:
            return OSError(-moved, os.strerror(-moved))
        if moved == operation.num_bytes or (moved % ALIGNMENT and not operation.is_write):
            return moved  # all of it, or the file ends here
        number, is_write, buffers, offset, num_bytes = operation
        left = (rest_of(buffers, moved), offset + moved, num_bytes - moved)
        _, more = perform(self._io, Operation(number, is_write, *left))
        return more if isinstance(more, OSError) else moved + more


def _call(name: str, *arguments: int) -> int:
    number = _NUMBERS.get(platform.machine(), {}).get(name)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while True:
        result: int = _syscall(number, *map(ctypes.c_long, arguments))
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def _take_context(depth: int) -> int:
    """The kernel's handle of a queue: one that was given back, else a new one."""
    try:
        return _unused[depth].pop()
    except IndexError:
        context = ctypes.c_ulong(0)
        _call("setup", depth, ctypes.addressof(context))
        return context.value


_unused: defaultdict[int, list[int]] = defaultdict(list)
"""Handles by depth. They are kept, because destroying one takes the kernel tens of milliseconds."""
os.register_at_fork(after_in_child=_unused.clear)  # they belong to the parent
