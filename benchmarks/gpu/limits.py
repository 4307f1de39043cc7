"""What this GPU and its link can do: the ceilings that the other sections are compared with."""

from __future__ import annotations

from typing import Any

import torch

from gpu.setup import Rows, Setup, plain_row


def run(setup: Setup) -> dict[str, Any]:
    """Copies in GB/s (bytes read and written), bf16 products in TFLOP/s, the link in GB/s."""
    found: dict[str, Any] = {"copy_gb_per_s": round(copy_rate(setup) / 1e9, 1)}
    found["matmul_tflop_per_s"] = round(matmul_rate(setup) / 1e12, 1)
    found |= {name: round(rate / 1e9, 2) for name, rate in link_rates(setup).items()}
    setup.limits |= found
    return found


def copy_rate(setup: Setup) -> float:
    """Bytes per second of a copy within the device's memory, read and written."""
    source = setup.randn(setup.size(1 << 30, 1 << 16))
    target = torch.empty_like(source)
    seconds = setup.median_s(lambda: target.copy_(source))
    return 2 * source.numel() * source.element_size() / seconds


def matmul_rate(setup: Setup) -> float:
    """Operations per second of a square product of random bf16 matrices."""
    n = setup.size(8192, 64)
    left, right = setup.randn(n, n), setup.randn(n, n)
    return 2 * n**3 / setup.median_s(lambda: left @ right)


def link_rates(setup: Setup) -> dict[str, float]:
    """Bytes per second between pinned memory and the device: each way alone, and both at once."""
    num_bytes = setup.size(1 << 30, 1 << 16)
    is_cuda = setup.device.type == "cuda"
    hosts = [torch.ones(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
    devices = [torch.ones(num_bytes, dtype=torch.uint8, device=setup.device) for _ in range(2)]
    up = setup.median_s(lambda: devices[0].copy_(hosts[0], non_blocking=True), 10)
    down = setup.median_s(lambda: hosts[1].copy_(devices[1], non_blocking=True), 10)
    rates = {"up_gb_per_s": num_bytes / up, "down_gb_per_s": num_bytes / down}
    if is_cuda:
        streams = [torch.cuda.Stream() for _ in range(2)]

        def both() -> None:
            for stream, target, source in zip(
                streams, [devices[0], hosts[1]], [hosts[0], devices[1]], strict=True
            ):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
                torch.cuda.current_stream().wait_stream(stream)

        rates["both_gb_per_s"] = 2 * num_bytes / setup.median_s(both, 10)
    return rates


def rows(found: dict[str, Any]) -> Rows:
    yield plain_row("copy in device memory, read + written", found["copy_gb_per_s"], "GB/s")
    yield plain_row("bf16 matrix product", found["matmul_tflop_per_s"], "TFLOP/s")
    for name in ("up", "down", "both"):
        if f"{name}_gb_per_s" in found:
            yield plain_row(f"pinned memory, {name}", found[f"{name}_gb_per_s"], "GB/s")
