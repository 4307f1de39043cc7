"""The GPU pool's bytes and how many blocks it gets."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool, available_memory, cpu_default_bytes, num_pool_blocks
from tierkv.config import EngineConfig
from tierkv.errors import ConfigError

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="bfloat16")
CPU = torch.device("cpu")


def test_a_block_is_one_byte_range_in_layer_order() -> None:
    pool = GpuPool(LAYOUT, 5, CPU)
    assert pool.tensor.shape == (5, 3, 2, 2, 4, 8)
    assert pool.tensor.dtype is torch.bfloat16
    assert pool.tensor.is_contiguous() and pool.tensor[2].is_contiguous()
    assert pool.tensor[1].numel() * 2 == pool.block_bytes == LAYOUT.block_bytes
    assert not pool.tensor.any()
    assert (pool.num_blocks, pool.device) == (5, CPU)


def test_a_layer_is_a_view_where_the_layout_says() -> None:
    pool = GpuPool(LAYOUT, 5, CPU)
    pool.layer(1)[3] = 7.0
    place = LAYOUT.place(1)
    flat = pool.tensor[3].flatten().view(torch.uint8)
    start, end = place.offset_bytes, LAYOUT.place(2).offset_bytes
    assert flat[start:end].view(torch.bfloat16).eq(7.0).all()
    assert not flat[:start].any() and not flat[end:].any()
    assert int(pool.tensor.ne(0).sum()) == (end - start) // 2


def test_a_large_pool_takes_no_memory_until_written() -> None:
    layout = KVLayout(1, 8, 128, 16, "float32")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = GpuPool(layout, (2 << 30) // layout.block_bytes, CPU)
    pool.tensor[-1] = 1.0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024  # KiB
    assert pool.tensor[-1].eq(1.0).all() and not pool.tensor[0].any()


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_gpu_blocks=0.*768 bytes"):
        GpuPool(LAYOUT, 0, CPU)


def test_num_gpu_blocks_is_taken_as_it_is() -> None:
    assert num_pool_blocks(EngineConfig(num_gpu_blocks=7), LAYOUT, CPU) == 7


def test_kv_cache_memory_is_never_exceeded() -> None:
    config = EngineConfig(kv_cache_memory=10 * LAYOUT.block_bytes - 1)
    assert num_pool_blocks(config, LAYOUT, CPU) == 9


def test_too_little_memory_names_the_numbers() -> None:
    config = EngineConfig(kv_cache_memory=100)
    with pytest.raises(ConfigError, match=r"kv_cache_memory=100.*768 bytes, 192 per token"):
        num_pool_blocks(config, LAYOUT, CPU)


def test_default_on_cpu_is_a_quarter_of_what_is_free_up_to_4_gib() -> None:
    assert cpu_default_bytes(8 << 30) == 2 << 30
    assert cpu_default_bytes(64 << 30) == 4 << 30
    blocks = num_pool_blocks(EngineConfig(), LAYOUT, CPU, free_bytes=1 << 30)
    assert blocks == (256 << 20) // LAYOUT.block_bytes


def test_on_cuda_the_free_bytes_are_the_budget() -> None:
    device = torch.device("cuda")
    blocks = num_pool_blocks(EngineConfig(), LAYOUT, device, free_bytes=LAYOUT.block_bytes * 3 + 1)
    assert blocks == 3
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0.9"):
        num_pool_blocks(EngineConfig(), LAYOUT, device, free_bytes=-5)


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_available_memory_is_the_tightest_limit(tmp_path: Path) -> None:
    root = _write(tmp_path, {"proc/meminfo": "MemTotal: 100 kB\nMemAvailable:  90 kB\n"})
    assert available_memory(root) == 90 * 1024
    group = {
        "sys/fs/cgroup/memory.max": "50000\n",
        "sys/fs/cgroup/memory.current": "30000\n",
        "sys/fs/cgroup/memory.stat": "anon 10\ninactive_file 5000\n",
    }
    assert available_memory(_write(root, group)) == 25000


def test_a_cgroup_without_limit_does_not_count(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemAvailable:  90 kB\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "30000\n",
    }
    assert available_memory(_write(tmp_path, files)) == 90 * 1024
