"""What the programs share, and the table of their results."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from programs import run


def test_occupancy_counts_shared_blocks_once() -> None:
    occupancy, config = import_module("common.occupancy"), import_module("tierkv")
    core = occupancy.engine_without_model(1024, 8, 256)
    params = config.SamplingParams(n=3, max_tokens=9, ignore_eos=True)
    counts = occupancy.play(core, [occupancy.Arrival(0, list(range(40)), params)])
    # 3 samples share the prompt's 5 blocks; each adds one block of its own, and the 9th token is
    # never fed back. Steps 2..9 hold 40 + 3 * (1..8) tokens in 5 + 3 blocks, after the 9th none.
    assert counts.num_steps == 9
    assert counts.held == 40 + sum(40 + 3 * i for i in range(1, 8))
    assert counts.paged == 8 * (5 + 7 * (5 + 3))
    assert counts.contiguous == 3 * 40 + sum(3 * (40 + i) for i in range(1, 8))


def test_sessions_play_in_waves() -> None:
    workloads = import_module("common.workloads")
    tree = workloads.agent("branching")
    assert [len(wave) for wave in tree.waves] == [3, 9, 27]
    assert [len(wave) for wave in workloads.agent("linear").waves] == [2] * 8
    assert all(tree.turns[i].parent in tree.waves[0] for i in tree.waves[1])
    for make in workloads.SESSIONS.values():
        for shape in workloads.SHAPES:
            assert make(shape).turns == make(shape).turns  # from the seed alone


def test_alternate_reverses_the_order_and_keeps_every_run() -> None:
    runs, order = import_module("common.runs"), []

    def run_of(name: str) -> dict[str, Any]:
        order.append(name)
        return {"_seconds": 2.0 if name == "a" else 5.0, "note": name}

    samples = runs.alternate({n: lambda n=n: run_of(n) for n in "ab"}, 2, quiet_s=0.0)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert samples["a"].seconds == [2.0, 2.0] and samples["b"].median_s == 5.0
    assert samples["b"].notes == {"note": "b"}


def test_median_prefers_quiet_runs() -> None:
    runs = import_module("common.runs")
    assert runs.Samples([1.0, 9.0, 2.0], [0.0, 1.5, 0.1]).median_s == 1.5
    assert runs.Samples([1.0, 9.0, 3.0], [1.0, 1.5, 0.7]).median_s == 3.0


def test_unequal_work_is_refused() -> None:
    systems, workloads = import_module("common.systems"), import_module("common.workloads")
    request = workloads.Request([1, 2, 3], 2)
    assert systems.check_lengths([request], [[7, 8]]) == 2
    with pytest.raises(RuntimeError, match="1 tokens, asked 2"):
        systems.check_lengths([request], [[7]])


def test_the_table_compares_with_targets(tmp_path: Path) -> None:
    run("memory_waste", tmp_path)
    slow = {"equal_work": {"32": {"ratio": 9.0}, "256": {"ratio": 1.2}}, "target_ratio": 1.35}
    (tmp_path / "hf_baseline.json").write_text(json.dumps(slow))
    rows = import_module("write_table").main(["--quick", "--out", str(tmp_path)])
    assert rows[0][1:] == ("9.00x", "", "")
    assert rows[1][1:] == ("1.20x", ">= 1.35x", "no")
    assert rows[2][3] in ("yes", "no") and rows[2][2] == ">= 92.0%"
    assert "| 1.20x | >= 1.35x | no |" in (tmp_path / "TABLE.md").read_text()


def test_results_name_no_path_of_this_machine(tmp_path: Path) -> None:
    machine = import_module("common.machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/somewhere/benchmarks/x.py", "--out", "/elsewhere/results"])
        assert machine.describe()["command"] == "python benchmarks/x.py --out results"
