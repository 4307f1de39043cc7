"""`benchmarks/policies.py` compares all policies with the optimum, the same way each time."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


def write_trace(path: Path) -> None:
    """Twenty conversations of four turns side by side, behind one prompt of two blocks."""
    with path.open("w") as file:
        for number in range(80):
            session, turn = number % 20, number // 20 + 1
            record = {
                "timestamp": 1000 * number,
                "session_id": f"s{session}",
                "turn": turn,
                "input_length": 16 * (2 + 3 * turn) + 5,
                "output_length": 10,
                "block_size": 16,
                "hash_runs": [[0, 2], [1000 * (session + 1), 3 * turn]],
            }
            file.write(json.dumps(record) + "\n")


def run(*options: object) -> dict[str, Any]:
    found: dict[str, Any] = import_module("policies").main([str(option) for option in options])
    return found


def test_all_policies_and_the_optimum(tmp_path: Path) -> None:
    path = tmp_path / "small.jsonl"
    write_trace(path)
    registry = import_module("tierkv.policies.registry")
    entry = run("--trace", path, "--shares", "10,50", "--out", tmp_path)["traces"]["small"]
    assert entry["requests"] == 80 and entry["unique_blocks"] == 2 + 20 * 12
    assert [each["capacity"] for each in entry["shares"].values()] == [24, 121]
    for each in entry["shares"].values():
        assert set(each["policies"]) == {*registry.known("eviction")} - {"belady"}
        assert each["policies"]["lru"]["score"] == 0
        for figures in each["policies"].values():
            rate = figures["hit_blocks"] * 16 / entry["input_tokens"]
            assert figures["hit_rate"] == pytest.approx(rate, abs=1e-6)
            assert rate <= each["optimum_pinned"] + 1e-6
        assert each["optimum_pinned"] <= each["optimum"] <= entry["infinite"]
    assert (tmp_path / "policies-small.png").stat().st_size > 1000


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "small.jsonl"
    write_trace(path)
    for jobs in (1, 2):
        options = ("--policies", "reuse,arc", "--shares", "5", "--jobs", jobs)
        run("--trace", path, "--out", tmp_path / f"{jobs}", *options)
    written = [(tmp_path / f"{jobs}" / "policies.json").read_bytes() for jobs in (1, 2)]
    assert written[0] == written[1]


def test_variants(tmp_path: Path) -> None:
    path = tmp_path / "small.jsonl"
    write_trace(path)
    options = ("--policies", "lru", "--shares", "5", "--block-size", "32")
    variants = ("--variants", "all,first,second,without-hints")
    traces = run("--trace", path, "--out", tmp_path, *options, *variants)["traces"]
    assert {name: each["requests"] for name, each in traces.items()} == {
        "small": 80,
        "small-first": 40,
        "small-second": 40,
        "small-without-hints": 80,
    }
    assert all(each["block_size"] == 32 for each in traces.values())
    with pytest.raises(SystemExit, match="'third' is none of all, first"):
        run("--trace", path, "--quick", "--variants", "third")


def test_quick_replays_a_generated_trace(tmp_path: Path) -> None:
    result = run("--quick", "--policies", "lru,reuse", "--shares", "10", "--out", tmp_path)
    assert result == json.loads((tmp_path / "policies.json").read_text())
    (entry,) = result["traces"].values()
    assert entry["requests"] == 200
