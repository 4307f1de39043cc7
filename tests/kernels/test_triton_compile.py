"""The kernels are compiled for GPUs that are not here: matrix instructions, registers, memory.

`triton_compile` does it in a process of its own, because here kernels are interpreted.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = (80, 90, 100)
# Shared memory that one program may use, in bytes.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
KINDS = ("decode", "prefill")
MAIN = {"dtype": "bfloat16", "num_kv_heads": 8, "group": 4, "head_dim": 128, "block_size": 16}
PRODUCTS = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
OTHERS: list[dict[str, Any]] = [
    {"head_dim": 64, "group": 8, "window": 128, "sinks": True},
    {"head_dim": 256, "group": 2, "window": 4096, "softcap": 50.0},
    {"head_dim": 80, "group": 1, "num_kv_heads": 32},
    {"head_dim": 96, "group": 1, "num_kv_heads": 32, "window": 2048},
    {"head_dim": 64, "group": 71, "num_kv_heads": 1},
    {"head_dim": 256, "group": 48, "num_kv_heads": 1},
    {"head_dim": 128, "group": 20, "num_kv_heads": 2},
    {"block_size": 64},
    {"block_size": 256, "dtype": "float16"},
    {"block_size": 8},
    {"num_sms": 1},
    {"dtype": "float32"},
    {"dtype": "float32", "head_dim": 256},
]


def compile_cases(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Resources of every kernel the cases launch."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder / "cache"), CUDA_VISIBLE_DEVICES="")
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).parents[1] / "support" / "triton_compile.py"
    command = [sys.executable, str(program), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(kernel: dict[str, Any]) -> None:
    """It fits, reads 16 bytes at a time and multiplies on tensor cores what is not fp32.

    Decode allocates and launches, nothing else: no value goes to the host or comes from there.
    """
    case = kernel["case"]
    if case["kind"] == "decode":
        assert set(kernel["operations"]) <= {"aten.new_empty.default"}, kernel
    assert kernel["shared"] <= SHARED[case["arch"]], kernel
    assert kernel["wide_loads"], kernel
    if kernel["kernel"] == "attend" and case["dtype"] != "float32":
        # The 16 rows of decode are too few for the instructions of 64 rows and more.
        wanted = PRODUCTS[case["arch"]] if case["kind"] == "prefill" else "mma"
        assert kernel[wanted] or (case["group"] > 16 and kernel[PRODUCTS[case["arch"]]]), kernel


def test_what_most_models_launch(tmp_path: Path) -> None:
    cases = [MAIN | {"arch": arch, "kind": kind} for arch in ARCHITECTURES for kind in KINDS]
    cases += [MAIN | {"arch": arch, "kind": "copies"} for arch in ARCHITECTURES]
    found = compile_cases(cases, tmp_path)
    names = {kernel["kernel"] for kernel in found}
    others = {"store_tokens", "copy_words", "norm_rows", "gate_rows", "rotate_heads"}
    assert names == {"attend", "merge_parts", "merge_segment", "widen", *others}
    for kernel in found:
        check(kernel)
        assert not kernel["stack"] and not kernel["local"], kernel  # no register spills


@pytest.mark.parametrize(
    "change",
    [
        {},
        *(
            pytest.param(c, marks=pytest.mark.full)
            for c in ({"window": 300}, {"num_kv_heads": 150})
        ),
    ],
    ids=str,
)
def test_after_the_warm_up_no_step_compiles(change: dict[str, Any], tmp_path: Path) -> None:
    (found,) = compile_cases([MAIN | {"arch": 90, "kind": "warm_up"} | change], tmp_path)
    assert found["late"] == []


@pytest.mark.full
@pytest.mark.parametrize("arch", SHARED)
def test_the_rest(arch: int, tmp_path: Path) -> None:
    cases = [
        MAIN | {"arch": arch, "kind": kind} | other
        for kind, other in itertools.product(KINDS, OTHERS)
    ]
    for kernel in compile_cases(cases, tmp_path):
        check(kernel)
        if arch == 90:
            assert not kernel["stack"], kernel
