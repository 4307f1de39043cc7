"""Compiles what a launch on a GPU would run, without one.

    python tests/support/triton_compile.py CASES.json

A driver that only knows a target stands in for CUDA's, and launches become compilations, so that
the very arguments the launchers make (types, alignment, constants) are what is compiled. CASES is
a list of `{"arch": 90, "kind": "decode", ...}`; each kernel's resources are printed as a line of
JSON.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tierkv.kernels.metadata import AttentionMetadata, build_metadata, warm_up_steps
from tierkv.kernels.triton import attention, copies, merge, nucleus, rows
from tierkv.kernels.triton.tiles import Device

WIDE_LOAD = r"cp\.async\.cg|ld\.global[\w.]*\.(?:v4\.b32|v2\.b64)"  # of 16 bytes


class TargetOnly:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a kernel is compiled once per device

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder(TorchDispatchMode):
    """Names of the tensor operations between launches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def compiled(arch: int, launch: Callable[[], object]) -> list[Any]:
    """The kernels that `launch()` would run."""
    driver.set_active(TargetOnly(arch))
    kernels = []

    def compile_only(self: JITFunction[Any], grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            kernels.append(self.warmup(*args, grid=grid, **kwargs))

        return run

    JITFunction.__getitem__ = compile_only
    launch()
    return kernels


def resources(kernel: Any) -> dict[str, Any]:
    """Registers and stack bytes from the machine code, matrix instructions from the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tcgen05": ptx.count("tcgen05.mma"),
        "wide_loads": len(re.findall(WIDE_LOAD, ptx)),
        **found,
    }


def launch_of(case: dict[str, Any]) -> Callable[[], object]:
    """What the case launches; its tensors are memory that nothing reads."""
    dtype = getattr(torch, case["dtype"])
    heads, group, dim, size = (case[k] for k in ("num_kv_heads", "group", "head_dim", "block_size"))
    queries = [1, 1] if case["kind"] == "decode" else [64, 300]
    contexts = [9000, 5000]
    tables = [list(range(-(-context // size))) for context in contexts]
    meta = build_metadata(queries, contexts, tables, size)
    kv = torch.empty(1 + meta.max_block_id, 2, heads, size, dim, dtype=dtype)
    q = torch.empty(sum(queries), heads * group, dim, dtype=dtype)
    if case["kind"] == "copies":
        return lambda: launch_others(q, kv, meta)
    device = Device(case.get("num_sms", 132), divmod(case["arch"], 10))
    sinks = torch.empty(heads * group) if case.get("sinks") else None
    options = {"scale": 0.1, "window": case.get("window"), "softcap": case.get("softcap")}
    out = torch.empty_like(q)
    return lambda: attention.attention(q, kv, meta, out, None, device, sinks=sinks, **options)


def launch_others(q: torch.Tensor, kv: torch.Tensor, meta: AttentionMetadata) -> None:
    """Every launch that is not attention itself."""
    k = q[:, : kv.shape[2]]
    wide = q.flatten(1)
    rows.rms_norm(wide, torch.empty(wide.shape[1]), 1e-6, True)
    rows.act_and_mul(wide, "silu")
    rows.act_and_mul(wide, "gelu_tanh")
    rows.rotate(q.transpose(0, 1), k.transpose(0, 1), k[:, 0], k[:, 0])
    copies.write_kv(kv, k, k, meta.slot_mapping)
    blocks = kv.view(len(kv), -1).view(torch.uint8)
    copies.copy_rows(blocks, meta.block_tables[0], blocks[:9], None, 9, 4)
    lse = torch.empty(k.shape[:2])
    merge.merge_attention([k.float(), k.float()], [lse, lse], torch.empty(k.shape[1]))
    number = torch.empty(5)
    nucleus.widen_nuclei(torch.empty(5, 128_256), number, number, number.bool(), number)


def late_variants(case: dict[str, Any]) -> list[str]:
    """Attention kernels that only random steps compile, after the steps of the warm-up did."""
    heads, size = case["num_kv_heads"], case["block_size"]
    kv = torch.empty(1, 2, heads, size, case["head_dim"], dtype=torch.bfloat16)
    device = Device(132, divmod(case["arch"], 10))

    def variants(meta: AttentionMetadata) -> set[str]:
        q = torch.empty(meta.num_tokens, heads * case["group"], case["head_dim"], dtype=kv.dtype)
        options = {"scale": 0.1, "window": case.get("window")}
        out = torch.empty_like(q)
        kernels = compiled(
            case["arch"], lambda: attention.attention(q, kv, meta, out, None, device, **options)
        )
        return {f"{kernel.metadata.name} {kernel.hash}" for kernel in kernels}

    known = set().union(*(variants(meta) for meta in warm_up_steps(size, "cpu")))
    late = set()
    for _ in range(30):
        contexts = [random.choice([1, 50, 700, 3000, 40_000]) for _ in range(random.randint(1, 90))]
        queries = [1 if random.random() < 0.9 else min(c, random.randint(1, 500)) for c in contexts]
        tables = [[0] * -(-context // size) for context in contexts]
        late |= variants(build_metadata(queries, contexts, tables, size)) - known
    return sorted(late)


def main(path: str) -> None:
    for case in json.loads(Path(path).read_text()):
        if case["kind"] == "warm_up":
            print(json.dumps({"case": case, "late": late_variants(case)}), flush=True)
            continue
        launch = launch_of(case)
        with Recorder() as recorder:
            kernels = compiled(case["arch"], launch)
        for kernel in kernels:
            found = {"case": case, "operations": sorted(recorder.names), **resources(kernel)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
