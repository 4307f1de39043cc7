"""The GPU pool: the one tensor that holds every block the model may read."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from tierkv.cache.layout import KVLayout
from tierkv.config import EngineConfig, parse_bytes
from tierkv.errors import ConfigError

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""KV dtypes the GPU pool can be made of."""

_CPU_DEFAULT_BYTES = 4 << 30
_CPU_DEFAULT_SHARE = 0.25


class GpuPool:
    """`[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, zero when new.

    On the CPU it is ordinary memory that takes physical pages only as blocks are written.

    Attributes:
        layout: what a block looks like.
        tensor: the pool; `tensor[i]` is block i, one contiguous byte range.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device | str) -> None:
        if num_blocks < 1:
            fix = f"the pool needs at least one block of {layout.block_bytes} bytes"
            raise ConfigError("num_gpu_blocks", num_blocks, fix)
        self.layout = layout
        shape, dtype = (num_blocks, *layout.block_shape), TORCH_DTYPES[layout.dtype]
        self._pages: mmap.mmap | None = None
        if torch.device(device).type == "cpu":
            self._pages = _map(shape, dtype)
            self.tensor = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        else:
            self.tensor = _zeros(shape, dtype, torch.device(device))
        self._layers = [self.tensor[:, layer] for layer in range(layout.num_layers)]

    @property
    def num_blocks(self) -> int:
        return int(self.tensor.shape[0])

    def read(self, slot: int) -> bytes:
        """The bytes of a block."""
        return self.tensor[slot].cpu().view(torch.uint8).numpy().tobytes()

    def write(self, slot: int, payload: bytes) -> None:
        """Let a block be these bytes."""
        data = torch.frombuffer(bytearray(payload), dtype=self.tensor.dtype)
        self.tensor[slot].copy_(data.view(self.layout.block_shape))

    def give_back(self) -> int:
        """Let the system have the memory of all blocks, which are zero then; returns bytes.

        It is taken again as blocks are written. Nothing happens on other devices than the CPU.
        """
        if self._pages is None:
            return 0
        self._pages.madvise(mmap.MADV_DONTNEED)
        return len(self._pages)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.layout.block_bytes

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def layer(self, index: int) -> Tensor:
        """One layer's view `[num_blocks, 2, num_kv_heads, block_size, head_dim]`, strided."""
        return self._layers[index]


def _map(shape: tuple[int, ...], dtype: torch.dtype) -> mmap.mmap:
    """Zeros that cost nothing until they are touched: `torch.zeros` would write every page."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        fix = f"the pool's {num_bytes} bytes cannot be mapped ({error}); ask for less"
        raise ConfigError("kv_cache_memory", num_bytes, fix) from None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The pool on a GPU."""
    try:
        return torch.zeros(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        free = torch.cuda.mem_get_info(device)[0]
        fix = f"{num_bytes} bytes do not fit: {device} has {free} free; ask for fewer"
        raise ConfigError("num_gpu_blocks", shape[0], fix) from error


def num_pool_blocks(
    config: EngineConfig, layout: KVLayout, device: torch.device, free_bytes: int | None = None
) -> int:
    """How many blocks the GPU pool gets.

    Args:
        config: `num_gpu_blocks`, else `kv_cache_memory`, else what the device leaves.
        layout: bytes of a block.
        device: where the pool will be.
        free_bytes: on CUDA, what `gpu_memory_utilization` leaves for KV after a profiling run; on
            the CPU, memory available to this process, measured if None.

    Raises:
        ConfigError: not even one block fits, with the numbers.
    """
    if config.num_gpu_blocks is not None:
        return config.num_gpu_blocks
    if config.kv_cache_memory is not None:
        option, budget = "kv_cache_memory", parse_bytes(config.kv_cache_memory, "kv_cache_memory")
    elif device.type == "cpu":
        available = available_memory() if free_bytes is None else free_bytes
        option, budget = "kv_cache_memory", cpu_default_bytes(available) // layout.num_shards
    else:
        option, budget = "gpu_memory_utilization", free_bytes or 0
    num_blocks = budget // layout.block_bytes
    if num_blocks < 1:
        fix = (
            f"{budget} bytes hold no block of {layout.block_size} tokens "
            f"({layout.block_bytes} bytes, {layout.bytes_per_token} per token); give more"
        )
        raise ConfigError(option, getattr(config, option), fix)
    return num_blocks


def cpu_default_bytes(available: int) -> int:
    """The pool on a CPU when nothing was asked for: a quarter of what is free, 4 GiB at most."""
    return min(_CPU_DEFAULT_BYTES, int(available * _CPU_DEFAULT_SHARE))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still use: the least of the machine's and its cgroups' headroom."""
    found = [_meminfo(root / "proc/meminfo")]
    for limit, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        found.append(_headroom(root / limit, root / used))
    known = [size for size in found if size is not None]
    return min(known) if known else _CPU_DEFAULT_BYTES


def _meminfo(path: Path) -> int | None:
    """`MemAvailable`, or None where the system has no such file."""
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _headroom(limit: Path, used: Path) -> int | None:
    """A cgroup's limit minus its use; None without a limit."""
    if not limit.is_file() or not used.is_file():
        return None
    text = limit.read_text().strip()
    if not text.isdigit():
        return None
    return max(0, int(text) - int(used.read_text()) + _reclaimable(limit.parent))


def _reclaimable(group: Path) -> int:
    """File pages of the cgroup that the kernel drops under pressure."""
    stat = group / "memory.stat"
    if not stat.is_file():
        return 0
    rows = (line.split() for line in stat.read_text().splitlines())
    return sum(int(size) for name, size in rows if name == "inactive_file")
