"""The GPU, through torch and, where it is installed, NVIDIA's bindings of the CUDA runtime.

    many copies        cudaMemcpyBatchAsync, one call (CUDA 12.8 and later: cuda-bindings)
                       else one cudaMemcpyAsync each (`Tensor.copy_` on the stream)
    few large gathers  the kernels gather_blocks and scatter_blocks on the stream
    registration       cudaHostRegister, not torch's allocator of pinned memory, which rounds up to
                       a power of two

The call of cuda-bindings is the same in versions 12 and 13; version 12 answers with one number
more. Sources are read in stream order. A batch takes the addresses as they are, so it is for
devices that read registered memory at its own address (CanUseHostPointerForRegisteredMem); single
copies find out by themselves. Events sleep until they have happened (cudaEventBlockingSync) and
keep time.

Not yet run on a GPU.
"""

from __future__ import annotations

import errno
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tierkv.cache.cuda.streams import Event, Stream
from tierkv.errors import DeviceError
from tierkv.kernels import ops

logger = logging.getLogger(__name__)

_cuda: Any = torch.cuda  # its classes have no types

_NO_BATCHES = (
    "cudaErrorNotSupported",
    "cudaErrorCallRequiresNewerDriver",
    "cudaErrorInsufficientDriver",
)


class TorchDevice:
    """A `Device` of this process.

    Args:
        device: a CUDA device with its index.

    Attributes:
        has_batches: many copies are one call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runtime = _load_runtime(device.index or 0)

    @property
    def has_batches(self) -> bool:
        return self._runtime is not None

    def new_stream(self) -> Stream:
        with _doing("make a stream"):
            return _cuda.Stream(self.device)

    def compute_stream(self) -> Stream:
        return _cuda.current_stream(self.device)

    def record(self, stream: Stream) -> Event:
        with _doing("record an event"):
            event = _cuda.Event(enable_timing=True, blocking=True)
            event.record(stream)
            return event

    def wait(self, stream: Stream, event: Event) -> None:
        with _doing("wait for an event"):
            stream.wait_event(event)

    def synchronize(self, event: Event) -> None:
        with _doing("copy blocks"):
            event.synchronize()

    def seconds_between(self, start: Event, end: Event) -> float:
        with _doing("time a copy"):
            return float(start.elapsed_time(end)) / 1000

    def to_host(
        self,
        stream: Stream,
        rows: Tensor,
        froms: Sequence[int],
        host: Tensor,
        tos: Sequence[int],
    ) -> None:
        self._copy(stream, rows, froms, host, tos)

    def to_device(
        self,
        stream: Stream,
        host: Tensor,
        froms: Sequence[int],
        rows: Tensor,
        tos: Sequence[int],
    ) -> None:
        self._copy(stream, host, froms, rows, tos)

    def gather(self, stream: Stream, rows: Tensor, froms: Sequence[int], out: Tensor) -> None:
        with _doing("gather blocks"), _cuda.stream(stream):
            ops.gather_blocks(rows, self._ids(froms), out)

    def scatter(self, stream: Stream, source: Tensor, rows: Tensor, tos: Sequence[int]) -> None:
        with _doing("scatter blocks"), _cuda.stream(stream):
            ops.scatter_blocks(source, rows, self._ids(tos))

    def empty(self, num_rows: int, num_bytes: int) -> Tensor:
        with _doing(f"allocate {num_rows * num_bytes} bytes"):
            return torch.empty((num_rows, num_bytes), dtype=torch.uint8, device=self.device)

    def register(self, address: int, num_bytes: int) -> None:
        with _doing("register host memory"), _cuda.device(self.device):
            runtime = _cuda.cudart()
            status = runtime.cudaHostRegister(address, num_bytes, 0)
            if status != runtime.cudaError.success:
                reason = runtime.cudaGetErrorString(status)
                raise OSError(errno.ENOMEM, f"cudaHostRegister: {reason}")

    def unregister(self, address: int) -> None:
        with _doing("unregister host memory"), _cuda.device(self.device):
            runtime = _cuda.cudart()
            status = runtime.cudaHostUnregister(address)
            if status != runtime.cudaError.success:
                raise DeviceError("unregister host memory", runtime.cudaGetErrorString(status))

    def _copy(
        self,
        stream: Stream,
        source: Tensor,
        froms: Sequence[int],
        target: Tensor,
        tos: Sequence[int],
    ) -> None:
        with _doing("copy blocks"), _cuda.stream(stream):
            if len(froms) > 1 and self._copy_batch(stream, source, froms, target, tos):
                return
            for slot, to in zip(froms, tos, strict=True):
                target[to].copy_(source[slot], non_blocking=True)

    def _copy_batch(
        self,
        stream: Stream,
        source: Tensor,
        froms: Sequence[int],
        target: Tensor,
        tos: Sequence[int],
    ) -> bool:
        """One call for all; False where there is none, and then never again."""
        runtime = self._runtime
        if runtime is None:
            return False
        attributes = runtime.cudaMemcpyAttributes()
        order = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        attributes.srcAccessOrder = order
        attributes.flags = int(runtime.cudaMemcpyFlags.cudaMemcpyFlagPreferOverlapWithCompute)
        count, sizes = len(froms), [source.shape[1]] * len(froms)
        addresses = _addresses(target, tos), _addresses(source, froms)
        status, *_ = runtime.cudaMemcpyBatchAsync(
            *addresses, sizes, count, [attributes], [0], 1, stream.cuda_stream
        )
        if status != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()  # it would be found by who asks next
        if status.name in _NO_BATCHES:
            logger.info("copies are issued one by one: %s", status.name)
            self._runtime = None
            return False
        if status != runtime.cudaError_t.cudaSuccess:
            raise DeviceError("copy blocks", status.name)
        return True

    def _ids(self, slots: Sequence[int]) -> Tensor:
        """On the device, copied on the current stream without waiting for it."""
        ids = torch.tensor(slots, dtype=torch.int64).pin_memory()
        return ids.to(self.device, non_blocking=True)


def _addresses(rows: Tensor, slots: Sequence[int]) -> list[int]:
    start, stride = rows.data_ptr(), rows.stride(0)
    return [start + slot * stride for slot in slots]


def _load_runtime(index: int) -> Any:
    """cuda-bindings, if it is there and device `index` copies in batches."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
        attribute = runtime.cudaDeviceAttr.cudaDevAttrCanUseHostPointerForRegisteredMem
        status, is_same = runtime.cudaDeviceGetAttribute(attribute, index)
    except (ImportError, RuntimeError) as error:
        logger.info("copies are issued one by one: %s (pip install cuda-bindings)", error)
        return None
    if status != runtime.cudaError_t.cudaSuccess or not is_same:
        logger.info("copies are issued one by one: %s, same addresses: %s", status.name, is_same)
        return None
    return runtime if hasattr(runtime, "cudaMemcpyBatchAsync") else None


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """CUDA's errors, which torch raises as RuntimeErrors, become ours."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(what, str(error).partition("\n")[0]) from error
