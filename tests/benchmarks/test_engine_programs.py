"""Programs that ask what the engine costs beside others, or without a part of it.

Nothing here asserts a time: these are tiny models and one run each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import run


@pytest.mark.full
def test_hf_baseline(tmp_path: Path) -> None:
    result = run("hf_baseline", tmp_path)
    assert list(result["equal_work"]) == ["4", "8"]
    for count, entry in result["equal_work"].items():
        seconds = {name: s["median_s"] for name, s in entry["systems"].items()}
        assert entry["ratio"] == pytest.approx(seconds["generate"] / seconds["tierkv"], rel=0.02)
        for system in entry["systems"].values():
            rate = int(count) / system["median_s"]
            assert system["tokens_per_s"] == pytest.approx(rate, rel=0.02)
    for peaks in result["memory"].values():
        assert 0 < peaks["imports_mib"] <= peaks["loaded_mib"] <= peaks["peak_mib"]
    assert len(result["folklore"]) == 5
    assert all(row["ratio"] > 0 and row["equal_work_ratio"] > 0 for row in result["folklore"])


def test_throughput(tmp_path: Path) -> None:
    result = run("throughput", tmp_path)
    entry = result["models"]["tiny"]
    assert set(entry["systems"]) == {"generate_batch_8", "continuous_batching", "tierkv"}
    # Static batches decode every row as long as the longest: more than was asked for.
    decoded = entry["systems"]["generate_batch_8"]["decoded_tokens"]
    assert decoded > entry["generated_tokens"]
    assert entry["systems"]["tierkv"]["hit_tokens"] == 0  # no prompt shares anything
    for system, ratio in entry["ratios"].items():
        seconds = {name: s["median_s"] for name, s in entry["systems"].items()}
        assert ratio == pytest.approx(seconds[system] / seconds["tierkv"], rel=0.05)


@pytest.mark.full
def test_prefix_reuse(tmp_path: Path) -> None:
    result = run("prefix_reuse", tmp_path)
    shared = result["shared_prefix"]
    # 3 of 4 requests reuse the 96-token prefix of prompts of 104 tokens.
    assert shared["on"]["cached_tokens"] >= 3 * 96
    assert shared["off"]["cached_tokens"] == 0
    assert set(result["workloads"]) == {"rag", "coding", "chat", "agent"}
    for shapes in result["workloads"].values():
        for entry in shapes.values():
            assert entry["off"]["cached_tokens"] == 0
            assert 0 < entry["reused_share"] < 1
            assert entry["on"]["prompt_tokens"] == entry["off"]["prompt_tokens"]
            assert entry["on"]["new_tokens"] == entry["off"]["new_tokens"]


def test_memory_waste(tmp_path: Path) -> None:
    result = run("memory_waste", tmp_path)
    shares = [entry["share"] for entry in result["paged"].values()]
    assert shares[0] == 1.0  # a block of one token is full or absent
    assert shares == sorted(shares, reverse=True)
    assert result["reserve_max_share"] < shares[-1] < result["reserve_final_share"] < shares[4]
    assert (tmp_path / "memory_waste.png").read_bytes().startswith(b"\x89PNG")


def test_block_size(tmp_path: Path) -> None:
    result = run("block_size", tmp_path)
    wastes = [entry["waste"] for entry in result["block_sizes"].values()]
    assert wastes[0] == 0 and wastes == sorted(wastes)
    assert all(entry["tokens_per_s"] > 0 for entry in result["block_sizes"].values())
    assert (tmp_path / "block_size.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_overhead(tmp_path: Path) -> None:
    result = run("overhead", tmp_path, "--folder", str(tmp_path / "device"))
    roomy, tight = result["pools"]["roomy"]["cpu,nvme"], result["pools"]["tight"]["cpu,nvme"]
    for tiers in (roomy, tight):
        assert tiers["moved_bytes_gpu_cpu"] > 0 and tiers["moved_bytes_cpu_nvme"] > 0
    for tier in ("gpu", "cpu", "nvme"):
        assert roomy[f"{tier}_blocks_evicted"] == 0 < tight[f"{tier}_blocks_evicted"]
    assert not list((tmp_path / "device").iterdir())


def test_decode_latency(tmp_path: Path) -> None:
    result = run("decode_latency", tmp_path)
    pile_mib = result["pile_bytes"] / 2**20
    for budget, point in result["budgets"].items():
        assert 0 < point["p50_ms"] <= point["p99_ms"]
        moved_mib = point["moved_mib_per_step"] * point["steps"]
        assert moved_mib >= 0.999 * pile_mib if budget != "0" else moved_mib == 0
    assert (tmp_path / "decode_latency.png").read_bytes().startswith(b"\x89PNG")


def test_overlap(tmp_path: Path) -> None:
    result = run("overlap", tmp_path)
    assert list(result["idle_ms"]) == ["2", "5", "10"]
    assert all({*found} == {"in turn", "overlapped"} for found in result["idle_ms"].values())


def test_window(tmp_path: Path) -> None:
    result = run("window", tmp_path)
    assert 0 < result["snapshot_cpu_ms"] <= result["snapshot_cpu_p99_ms"]
    assert result["bytes"] > 0


@pytest.mark.full
def test_http_overhead(tmp_path: Path) -> None:
    result = run("http_overhead", tmp_path)
    http, own = (result["systems"][name] for name in ("HTTP", "in process"))
    assert result["ratio"] == pytest.approx(own["median_s"] / http["median_s"], rel=0.01)
    assert http["events"] > 9 and http["cpu_s_engine"] > 0
    assert result["first_ms"]["HTTP"] > 0
