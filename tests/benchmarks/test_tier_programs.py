"""Programs that ask what the tiers are worth.

Nothing here asserts a time: these are tiny models and one run each.
"""

from __future__ import annotations

import gzip
import json
from importlib import import_module
from pathlib import Path

import pytest
from programs import run


@pytest.mark.full  # half a minute of disk
def test_moves(tmp_path: Path) -> None:
    result = run("moves", tmp_path, "--folder", str(tmp_path / "device"))
    kinds = {"memcpy": [result["memory"]], "fio": [*result["nvme"].values()]}
    assert list(result["nvme"]) == ["in order", "random"]
    for base, all_entries in kinds.items():
        for entries in all_entries:
            assert list(entries) == [str(size << 10) for size in (32, 256, 1024, 4096)]
            for entry in entries.values():
                assert all(system["gb_per_s"] > 0 for system in entry["systems"].values())
                assert all(share > 0 for share in entry.get(f"share_of_{base}", {}).values())
    assert ("share_of_fio" in result["nvme"]["random"]["32768"]) == result["has_fio"]
    assert all(len(rates) == 2 for rates in result["sweep_gb_per_s"].values())
    assert (tmp_path / "moves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "device").iterdir())


def test_tier_ttft(tmp_path: Path) -> None:
    result = run("tier_ttft", tmp_path)
    for length, entry in result["lengths"].items():
        assert entry["cold"]["cached_tokens"] == 0
        for place in ("gpu", "cpu/load", "nvme/load", "restart"):
            assert entry[place]["cached_tokens"] >= int(length) - 64, place
        assert entry["cpu/recompute"]["cached_tokens"] == 0


def test_oversubscribe(tmp_path: Path) -> None:
    result = run("oversubscribe", tmp_path)
    assert result["pool_blocks"] < result["working_set_blocks"]
    computed = {name: v["computed_tokens"] for name, v in result["variants"].items()}
    for tiers in ("cpu", "cpu + nvme"):
        swapped = computed[f"swap + lookahead, {tiers}"]
        assert computed["unlimited pool"] <= swapped <= computed["recompute"]
        assert {*result["targets"]} <= {*result["ratios"][tiers]}


def test_policies_in_the_engine(tmp_path: Path) -> None:
    result = run("policies_engine", tmp_path)
    registry = import_module("tierkv.policies.registry")
    for entry in result["capacities"].values():
        names = {name for pair in entry["policies"] for name in pair.split(",")}
        assert names == {*registry.known("eviction")} - {"belady"}
        for figures in entry["policies"].values():
            assert figures["hit_tokens"] == figures["hit_tokens_gpu"] + figures["hit_tokens_cpu"]
            assert figures["hit_tokens_cpu"] > 0
            assert figures["hit_tokens"] <= entry["ceiling"]["hit_tokens"]


def test_policies_in_the_engine_replay_a_given_trace(tmp_path: Path) -> None:
    traces = import_module("common.traces")
    records = [
        {"hash_runs": [[0, 4]]},
        {"hash_runs": []},
        {"hash_ids": [0, 1, 9000]},
        {"hash_runs": [[0, 2], [9000, 3]]},
    ]
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    trace = traces.read(path, 3)
    assert trace == [[0, 1, 2, 3], [0, 1, 9000], [0, 1, 9000, 9001, 9002]]
    assert len({tuple(traces.prompt_of([i])) for i in range(0, 100_000, 7)}) == len(
        range(0, 100_000, 7)
    )
    entry = run("policies_engine", tmp_path, "--trace", str(path))["capacities"]["5 %"]
    assert {f["hit_tokens"] for f in entry["policies"].values()} == {2 * 5}
    assert entry["ceiling"]["hit_tokens"] == 2 * 5


@pytest.mark.full
def test_soak(tmp_path: Path) -> None:
    """Streams that are left leave nothing behind, and everybody else is answered."""
    result = run("soak", tmp_path)
    assert result["num_errors"] == 0, result["errors"]
    assert result["answered"] > 0 and result["left_by_their_client"] > 0
    assert result["preemptions"] > 0 and result["moves_gpu_cpu"] > 0
    assert not any(result["held_afterwards"].values())
