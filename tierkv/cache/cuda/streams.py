"""What the mover needs of a GPU: streams, events, copies of rows, registered host memory.

    stream      a queue of work that the GPU does in order; streams go on side by side
    event       a mark in a stream: it has happened when all work before it is done
    wait        what is issued to a stream from now on starts after an event

Every call returns at once, except `synchronize` and the first use of memory. The work itself reads
and writes memory at any later moment that the order of streams and events allows, so whoever
issues it keeps source and destination until an event behind it has happened.

`torch_device.py` is the real one. The tests' own executes copies as late, as mixed up and in as
many pieces as this allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

Stream = Any
"""A device's stream; only the device looks inside."""

Event = Any
"""A device's event, recorded once; only the device looks inside."""


class Device(Protocol):
    """A GPU. Any thread may call; calls for one stream come from one thread at a time.

    Rows are uint8 `[num_rows, num_bytes]`, contiguous inside a row. Those called `host` lie in
    memory that was registered, each inside one registered range.

    Raises:
        DeviceError: from every method; once the device has failed, from each call after that.
    """

    def new_stream(self) -> Stream: ...

    def compute_stream(self) -> Stream:
        """Where the calling thread's kernels go."""
        ...

    def record(self, stream: Stream) -> Event:
        """A new event behind all work that was issued to the stream."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """Let what is issued to the stream from now on start after the event."""
        ...

    def synchronize(self, event: Event) -> None:
        """Return when the event has happened; sleeps, without the interpreter lock."""
        ...

    def seconds_between(self, start: Event, end: Event) -> float:
        """Seconds from one event to another; both have happened."""
        ...

    def to_host(
        self, stream: Stream, rows: Tensor, froms: Sequence[int], host: Tensor, tos: Sequence[int]
    ) -> None:
        """Row `tos[i]` of `host` becomes row `froms[i]` of `rows`, in no order among them."""
        ...

    def to_device(
        self, stream: Stream, host: Tensor, froms: Sequence[int], rows: Tensor, tos: Sequence[int]
    ) -> None:
        """Row `tos[i]` of `rows` becomes row `froms[i]` of `host`, in no order among them."""
        ...

    def gather(self, stream: Stream, rows: Tensor, froms: Sequence[int], out: Tensor) -> None:
        """Row i of `out` becomes row `froms[i]` of `rows`; both are on the device."""
        ...

    def scatter(self, stream: Stream, source: Tensor, rows: Tensor, tos: Sequence[int]) -> None:
        """Row `tos[i]` of `rows` becomes row i of `source`; both are on the device."""
        ...

    def empty(self, num_rows: int, num_bytes: int) -> Tensor:
        """New rows on the device."""
        ...

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory, so that the device copies from and to it by itself.

        Raises:
            OSError: there is no more such memory; nothing else is wrong.
        """
        ...

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that starts there; no copy uses it any more."""
        ...
