"""Every benchmark program runs, compares equal work, and reports what its reader needs.

Nothing here asserts a time: these are tiny models and one run each.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def _programs(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pytest.MonkeyPatch]:
    """The programs importable, their models in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        patch.setenv("PYTHONPATH", str(repository / "benchmarks"))
        patch.setenv("TIERKV_BENCH_DIR", str(tmp_path_factory.mktemp("models")))
        yield patch


def run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """The result that program `name` writes with `--quick`; the table can show it."""
    result = import_module(name).main(["--quick", "--out", str(folder), *options])
    written = json.loads((folder / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert {"benchmark", "command", "date", "cpu", "cores", "torch", "transformers"} <= set(written)
    rows = list(import_module("write_table").READERS[name](written))
    assert rows and all(figure and bool(target) == bool(met) for _, figure, target, met in rows)
    return dict(written)


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


def test_window(tmp_path: Path) -> None:
    result = run("window", tmp_path)
    assert 0 < result["snapshot_cpu_ms"] <= result["snapshot_cpu_p99_ms"]
    assert result["bytes"] > 0


def test_http_overhead(tmp_path: Path) -> None:
    result = run("http_overhead", tmp_path)
    http, own = (result["systems"][name] for name in ("HTTP", "in process"))
    assert result["ratio"] == pytest.approx(own["median_s"] / http["median_s"], rel=0.01)
    assert http["events"] > 9 and http["cpu_s_engine"] > 0
    assert result["first_ms"]["HTTP"] > 0


@pytest.mark.full
def test_soak(tmp_path: Path) -> None:
    """Streams that are left leave nothing behind, and everybody else is answered."""
    result = run("soak", tmp_path)
    assert result["num_errors"] == 0, result["errors"]
    assert result["answered"] > 0 and result["left_by_their_client"] > 0
    assert result["preemptions"] > 0 and result["moves_gpu_cpu"] > 0
    assert not any(result["held_afterwards"].values())


def test_chaos(tmp_path: Path) -> None:
    result = run("chaos", tmp_path, "--seeds", "5", "--start", "7")
    assert (result["seeds"], result["start"], result["failed"]) == (5, 7, 0)
    assert result["totals"]["steps"] > 0
    one = import_module("chaos").main(["--seed", "7"])
    assert one == import_module("chaos").main(["--seed", "7", "--verbose"])


def test_goodput(tmp_path: Path) -> None:
    tiers = "gpu=600blocks,cpu=600blocks,nvme=1000blocks"
    result = run("goodput", tmp_path, "--tiers", tiers, "--rates", "1", "2")
    assert [each["rate"] for each in result["rates"]] == ["1", "1"]
    assert result["ladder"][0]["system"] == "as vLLM decides"
    assert len(result["ladder"]) == 7
    assert all(each["goodput"] > 0 for each in result["ladder"])
    within = result["goodput_within_p99_ttft_s"]
    assert within["tierkv"].keys() == within["as vLLM decides"].keys()


def test_sim_speed(tmp_path: Path) -> None:
    result = run("sim_speed", tmp_path)
    assert len(result["speed"]) == 3
    assert result["growth"]["requests"] == 100 and len(result["growth"]["resident_mb"]) == 10


@pytest.mark.full  # it calibrates first
def test_fidelity(tmp_path: Path) -> None:
    result = run("fidelity", tmp_path)
    assert result["live"]["requests"] == result["simulated"]["requests"] > 0
    assert result["live"]["hit_rate"] == pytest.approx(result["simulated"]["hit_rate"], abs=0.2)
