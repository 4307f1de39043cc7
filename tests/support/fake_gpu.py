"""A GPU made of a thread and ordinary memory, which does everything as awkwardly as it may.

Work waits in streams. The thread picks any stream whose first piece of work may be done, and does a
part of it: some bytes of one of the rows of a copy, in no order. So whatever CUDA's rules allow to
happen late, early, half or side by side does, and a missing wait shows as wrong bytes.

Copies of host memory are refused unless each row lies inside one registered range, as CUDA does.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tierkv.errors import DeviceError

PATIENCE_S = 60.0


class FakeEvent:
    """Happens when the thread reaches it."""

    def __init__(self) -> None:
        self.at_s: float | None = None


class FakeStream:
    """Work in order; each piece of work is an iterator that yields between its parts, or an event
    to wait for."""

    def __init__(self) -> None:
        self.work: deque[Iterator[None] | FakeEvent] = deque()
        self.is_held = False


class FakeGpu:
    """A `Device`.

    Args:
        seed: of what is done when.
        register_bytes: host memory that can be registered; None for any.

    Attributes:
        streams: all; compute: that of kernels, of every thread.
        ranges: registered host memory, address to bytes.
        calls: how often memory was registered, and each kind of copy issued.
        slow_bytes, may_register: ranges of this size and above wait for the event.
    """

    def __init__(self, seed: int = 0, register_bytes: int | None = None) -> None:
        self._random = random.Random(seed)
        self._register_bytes = register_bytes
        self._on_device: list[Tensor] = []
        self.streams: list[FakeStream] = []
        self._failure: str | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self.slow_bytes: int | None = None
        self.may_register = threading.Event()
        self.ranges: dict[int, int] = {}
        self.calls: Counter[str] = Counter()
        self.compute = self.new_stream()
        self._thread = threading.Thread(target=self._run, name="fake-gpu", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for tests

    def adopt(self, memory: Tensor) -> None:
        """This memory is on the device."""
        self._on_device.append(memory)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Let a kernel run on the compute stream, some time."""

        def work() -> Iterator[None]:
            kernel()
            yield

        self._issue(self.compute, work())

    def shut(self, stream: FakeStream) -> FakeEvent:
        """Nothing that is issued to the stream from now on is done until the gate is opened."""
        gate = FakeEvent()
        self._issue(stream, gate)
        return gate

    def open(self, gate: FakeEvent) -> None:
        with self._changed:
            gate.at_s = time.perf_counter()
            self._changed.notify_all()

    def hold(self, stream: FakeStream) -> None:
        """Nothing in the stream is done until `let_go`."""
        with self._changed:
            stream.is_held = True

    def let_go(self, stream: FakeStream) -> None:
        with self._changed:
            stream.is_held = False
            self._changed.notify_all()

    def settle(self) -> None:
        """Return when nothing more can be done."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._ready(), PATIENCE_S)

    def fail(self, reason: str) -> None:
        """From now on every call fails."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(PATIENCE_S)

    # ------------------------------------------------------------------ the protocol

    def new_stream(self) -> FakeStream:
        with self._changed:
            self.streams.append(FakeStream())
            return self.streams[-1]

    def compute_stream(self) -> FakeStream:
        return self.compute

    def record(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent()

        def work() -> Iterator[None]:
            event.at_s = time.perf_counter()
            yield

        self._issue(stream, work())
        return event

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        self._issue(stream, event)

    def synchronize(self, event: FakeEvent) -> None:
        with self._changed:
            while event.at_s is None:
                self._check_alive()
                assert not self._is_closed, "nobody is there to do it"
                self._changed.wait()
        self._check_alive()

    def seconds_between(self, start: FakeEvent, end: FakeEvent) -> float:
        assert start.at_s is not None and end.at_s is not None
        return end.at_s - start.at_s

    def to_host(
        self,
        stream: FakeStream,
        rows: Tensor,
        froms: Sequence[int],
        host: Tensor,
        tos: Sequence[int],
    ) -> None:
        self._check_device(rows)
        self._check_host(host, tos)
        self._issue(stream, self._copy("to_host", rows, froms, host, tos))

    def to_device(
        self,
        stream: FakeStream,
        host: Tensor,
        froms: Sequence[int],
        rows: Tensor,
        tos: Sequence[int],
    ) -> None:
        self._check_device(rows)
        self._check_host(host, froms)
        self._issue(stream, self._copy("to_device", host, froms, rows, tos))

    def gather(self, stream: FakeStream, rows: Tensor, froms: Sequence[int], out: Tensor) -> None:
        self._check_device(rows)
        self._check_device(out)
        self._issue(stream, self._copy("gather", rows, froms, out, range(len(froms))))

    def scatter(self, stream: FakeStream, source: Tensor, rows: Tensor, tos: Sequence[int]) -> None:
        self._check_device(rows)
        self._check_device(source)
        self._issue(stream, self._copy("scatter", source, range(len(tos)), rows, tos))

    def empty(self, num_rows: int, num_bytes: int) -> Tensor:
        memory = torch.randint(0, 256, (num_rows, num_bytes), dtype=torch.uint8)
        self.adopt(memory)
        return memory

    def register(self, address: int, num_bytes: int) -> None:
        self._check_alive()
        self.calls["register"] += 1
        if self.slow_bytes is not None and num_bytes >= self.slow_bytes:
            assert self.may_register.wait(PATIENCE_S)
            self._check_alive()
        assert address % 4096 == 0 and num_bytes > 0
        for start, size in self.ranges.items():
            assert address + num_bytes <= start or start + size <= address, "registered already"
        limit = self._register_bytes
        if limit is not None and sum(self.ranges.values()) + num_bytes > limit:
            raise OSError("cudaHostRegister: out of memory")
        self.ranges[address] = num_bytes

    def unregister(self, address: int) -> None:
        self._check_alive()
        del self.ranges[address]

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._is_closed:
            with self._changed:
                for _ in range(self._random.randint(1, 64)):
                    if ready := self._ready():
                        self._advance(self._random.choice(ready))
                self._changed.notify_all()
                if not self._is_closed and not self._ready():
                    self._changed.wait()
            if self._random.random() < 0.2:
                time.sleep(0.0001)  # the others have their turn

    def _ready(self) -> list[FakeStream]:
        """Streams whose first piece of work may be done."""
        return [
            stream
            for stream in self.streams
            if stream.work and not stream.is_held and _may_go_on(stream.work[0])
        ]

    def _advance(self, stream: FakeStream) -> None:
        """Do some part of the stream's first piece of work."""
        work = stream.work[0]
        if isinstance(work, FakeEvent) or next(work, self) is self:
            stream.work.popleft()

    def _copy(
        self,
        kind: str,
        source: Tensor,
        froms: Sequence[int],
        target: Tensor,
        tos: Sequence[int],
    ) -> Iterator[None]:
        """Pieces of rows in no order."""
        self.calls[kind] += 1
        num_bytes = source.shape[1]
        assert target.shape[1] == num_bytes
        assert len(set(tos)) == len(tos), "a row comes twice"
        pieces: list[tuple[int, int, int, int]] = []
        for slot, to in zip(froms, tos, strict=True):
            borders = sorted(self._random.sample(range(1, num_bytes), min(2, num_bytes - 1)))
            pairs = itertools.pairwise([0, *borders, num_bytes])
            pieces += [(slot, to, first, end) for first, end in pairs]
        self._random.shuffle(pieces)
        inputs, outputs = source.numpy(), target.numpy()

        def work() -> Iterator[None]:
            for slot, to, first, end in pieces:
                outputs[to, first:end] = inputs[slot, first:end]
                yield

        return work()

    def _issue(self, stream: FakeStream, work: Iterator[None] | FakeEvent) -> None:
        self._check_alive()
        with self._changed:
            stream.work.append(work)
            self._changed.notify_all()

    # ------------------------------------------------------------------ what CUDA checks

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise DeviceError("copy blocks", self._failure)

    def _check_device(self, rows: Tensor) -> None:
        start = rows.data_ptr()
        inside = (m.data_ptr() <= start < m.data_ptr() + m.nbytes for m in self._on_device)
        assert any(inside), "not on the device"

    def _check_host(self, rows: Tensor, slots: Sequence[int]) -> None:
        for slot in slots:
            first = rows.data_ptr() + slot * rows.stride(0)
            end = first + rows.shape[1]
            ranges = list(self.ranges.items())
            if not any(start <= first and end <= start + size for start, size in ranges):
                raise DeviceError("copy blocks", "cudaErrorInvalidValue")


def _may_go_on(work: Iterator[None] | FakeEvent) -> bool:
    return not isinstance(work, FakeEvent) or work.at_s is not None
