"""How the ranks' processes find each other, and what they share when they compute."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from tierkv.config import EngineConfig
from tierkv.errors import ConfigError
from tierkv.model.device import choose_device
from tierkv.model.shard import OPTION, Shard, check_package

SETUP_S = 120.0
"""How long the processes have to start and to find each other."""

_COLLECTIVE = timedelta(minutes=30)  # ranks may read their weights at different speeds
_HOST = "127.0.0.1"
_INTERFACE = "GLOO_SOCKET_IFNAME"


def check_ranks(config: EngineConfig) -> None:
    """Raise ConfigError unless this process can be the first of several ranks."""
    size = config.tensor_parallel_size
    if dist.is_initialized():
        fix = "torch.distributed is in use in this process, by another engine say; close that first"
        raise ConfigError(OPTION, size, fix)
    device, num_gpus = choose_device(config.device).type, torch.cuda.device_count()
    if device == "cuda" and num_gpus < size:
        raise ConfigError(OPTION, size, f"there are {num_gpus} GPUs; choose at most that")
    if device == "cpu" and num_gpus:
        fix = "ranks on a machine with GPUs use these: set device=cuda, or CUDA_VISIBLE_DEVICES=''"
        raise ConfigError("device", config.device, fix)
    if config.quantization is not None:
        fix = "weights that ranks share are not quantized; leave it out"
        raise ConfigError("quantization", config.quantization, fix)
    if config.cuda_graph_sizes is not None:
        fix = "steps of several ranks are not captured as graphs yet; leave it out"
        raise ConfigError("cuda_graph_sizes", config.cuda_graph_sizes, fix)
    check_package(size)


def make_store(size: int) -> TCPStore:
    """Where the ranks meet: on a free port of the loopback interface, held by rank 0."""
    timeout = timedelta(seconds=SETUP_S)
    return TCPStore(_HOST, 0, size, True, timeout, wait_for_workers=False)


def find_store(port: int, size: int) -> TCPStore:
    """The same one, from a worker."""
    return TCPStore(_HOST, port, size, False, timedelta(seconds=SETUP_S))


def join(store: Store, shard: Shard, device: str) -> None:
    """Become one of the ranks; returns when all have.

    Raises:
        ConfigError: they did not find each other.
    """
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(shard.rank)
        backend = "cpu:gloo,cuda:nccl"
    store.set_timeout(timedelta(seconds=SETUP_S))
    try:
        with _loopback():
            dist.init_process_group(
                backend, store=store, rank=shard.rank, world_size=shard.size, timeout=_COLLECTIVE
            )
    except RuntimeError as error:  # DistError and its like among them
        first, *_ = str(error).splitlines() or [repr(error)]
        fix = f"the ranks did not find each other ({first})"
        raise ConfigError(OPTION, shard.size, fix) from error


@contextmanager
def _loopback() -> Iterator[None]:
    """Let gloo use the loopback interface, unless the user named another one."""
    names = [name for _, name in socket.if_nameindex()]
    if _INTERFACE in os.environ or "lo" not in names:
        yield
        return
    os.environ[_INTERFACE] = "lo"
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def leave(num_threads: int | None) -> None:
    """Be a process of its own again, with so many threads for the CPU."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def give_up(device: str) -> None:
    """A rank is dead: let a collective that waits for it fail. gloo notices by itself."""
    if device == "cuda" and dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def share_threads(config: EngineConfig) -> int:
    """Divide the CPU's threads among the ranks, unless the options say how many each has; returns
    how many this process had."""
    before = torch.get_num_threads()
    if config.num_threads is None:
        torch.set_num_threads(max(1, before // config.tensor_parallel_size))
    return before
