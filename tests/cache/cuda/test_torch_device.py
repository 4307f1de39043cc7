"""The real device, as far as it goes without a GPU: which rows become which, and what is called.

Streams are None, which torch takes for the one there is; rows lie in ordinary memory. Not yet run
on a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tierkv.cache.cuda import torch_device
from tierkv.cache.cuda.streams import Device
from tierkv.cache.cuda.torch_device import TorchDevice
from tierkv.errors import DeviceError

needs_bindings = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not here"
)


class Runtime:
    """`cuda.bindings.runtime`, whose batch copies are done at once."""

    class cudaMemcpyAttributes:
        srcAccessOrder: object = None
        flags = 0

    cudaMemcpySrcAccessOrder = SimpleNamespace(cudaMemcpySrcAccessOrderStream="in stream order")
    cudaMemcpyFlags = SimpleNamespace(cudaMemcpyFlagPreferOverlapWithCompute=1)
    cudaError_t = SimpleNamespace(cudaSuccess=SimpleNamespace(name="cudaSuccess"))

    def __init__(self, *rows: Tensor) -> None:
        self.rows, self.calls = rows, 0
        self.status = self.cudaError_t.cudaSuccess

    def cudaGetLastError(self) -> None:
        """Nothing."""

    def cudaMemcpyBatchAsync(
        self,
        dsts: list[int],
        srcs: list[int],
        sizes: list[int],
        count: int,
        attrs: list[Any],
        attrs_idxs: list[int],
        num_attrs: int,
        stream: int,
    ) -> tuple[object, ...]:
        assert len(dsts) == len(srcs) == len(sizes) == count
        assert (attrs_idxs, num_attrs, stream) == ([0], 1, 77)
        assert attrs[0].srcAccessOrder == "in stream order"
        self.calls += 1
        if self.status is self.cudaError_t.cudaSuccess:
            for to, source, size in zip(dsts, srcs, sizes, strict=True):
                self._at(to, size).copy_(self._at(source, size))
        return (self.status,)

    def _at(self, address: int, size: int) -> Tensor:
        for rows in self.rows:
            place = address - rows.data_ptr()
            if place >= 0 and place + size <= rows.untyped_storage().nbytes():
                return rows.as_strided((size,), (1,), rows.storage_offset() + place)
        raise AssertionError("an address outside")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> TorchDevice:
    """On the CPU, without batches; ids need not be copied there."""
    monkeypatch.setattr(torch_device, "_load_runtime", lambda index: None)
    monkeypatch.setattr(TorchDevice, "_ids", lambda self, slots: torch.tensor(slots))
    return TorchDevice(torch.device("cpu"))


def random_rows(num_rows: int, num_bytes: int, stride: int) -> Tensor:
    return torch.randint(0, 256, (num_rows, stride), dtype=torch.uint8)[:, :num_bytes]


def test_it_is_a_device() -> None:
    """Every method of the protocol is there, with its parameters."""
    for name, method in inspect.getmembers(Device, inspect.isfunction):
        if not name.startswith("_"):
            real = inspect.signature(getattr(TorchDevice, name))
            assert list(real.parameters) == list(inspect.signature(method).parameters), name


@pytest.mark.parametrize(("num_bytes", "stride"), [(6144, 8192), (40, 40), (13, 20)])
@pytest.mark.parametrize("is_batched", [False, True])
def test_rows_become_rows(num_bytes: int, stride: int, is_batched: bool, device) -> None:
    rng = random.Random(num_bytes)
    pool, host = random_rows(20, num_bytes, num_bytes), random_rows(16, num_bytes, stride)
    if is_batched:
        device._runtime = Runtime(pool, host)
    for copy, source, target in (
        (device.to_host, pool, host),
        (device.to_device, host, pool),
    ):
        froms, tos = rng.sample(range(len(source)), 9), rng.sample(range(len(target)), 9)
        expected = target.clone()
        expected[tos] = source[froms]
        with any_stream() as stream:
            copy(stream, source, froms, target, tos)
        assert torch.equal(target, expected)
    assert not is_batched or device._runtime.calls == 2


@contextmanager
def any_stream() -> Iterator[SimpleNamespace]:
    """A stream that is none, but may be made current."""
    nothing = torch.cuda.stream(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "stream", lambda stream: nothing)
        yield SimpleNamespace(cuda_stream=77)


@pytest.mark.parametrize("num_bytes", [6144, 40, 13])
def test_gathered_and_scattered(num_bytes: int, device: TorchDevice) -> None:
    rng = random.Random(num_bytes)
    pool, buffer = random_rows(20, num_bytes, num_bytes), random_rows(12, num_bytes, num_bytes)
    slots = rng.sample(range(20), 7)
    rest = buffer[7:].clone()
    device.gather(None, pool, slots, buffer[:7])
    assert torch.equal(buffer[:7], pool[slots])
    assert torch.equal(buffer[7:], rest)
    expected, tos = pool.clone(), rng.sample(range(20), 7)
    expected[tos] = buffer[:7]
    device.scatter(None, buffer[:7], pool, tos)
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("name", ["cudaErrorNotSupported", "cudaErrorCallRequiresNewerDriver"])
def test_without_batches_copies_go_one_by_one(name: str, device: TorchDevice) -> None:
    pool, host = random_rows(4, 40, 40), random_rows(4, 40, 40)
    runtime = device._runtime = Runtime(pool, host)
    runtime.status = SimpleNamespace(name=name)
    for _ in range(2):
        with any_stream() as stream:
            device.to_host(stream, pool, [0, 1], host, [2, 3])
    assert torch.equal(host[2:], pool[:2])
    assert (runtime.calls, device.has_batches) == (1, False)


def test_other_errors_are_the_gpus(device: TorchDevice) -> None:
    pool, host = random_rows(4, 40, 40), random_rows(4, 40, 40)
    device._runtime = Runtime(pool, host)
    device._runtime.status = SimpleNamespace(name="cudaErrorIllegalAddress")
    refused = pytest.raises(DeviceError, match=r"copy blocks.*IllegalAddress")
    with any_stream() as stream, refused:
        device.to_host(stream, pool, [0, 1], host, [2, 3])


def test_what_torch_raises_is_a_device_error(device: TorchDevice) -> None:
    class Event:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    with pytest.raises(DeviceError, match="illegal memory access") as caught:
        device.synchronize(Event())
    assert "Compile with" not in str(caught.value)


@needs_bindings
def test_the_real_bindings_take_the_call() -> None:
    """Without a driver they say so, and copies go one by one."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    device = TorchDevice(torch.device("cpu"))
    device._runtime = runtime
    pool, host = random_rows(4, 40, 40), random_rows(4, 40, 40)
    stream = SimpleNamespace(cuda_stream=0x10)
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU, and no such stream")
    assert not device._copy_batch(stream, pool, [0, 1], host, [2, 3])
    assert not device.has_batches
