"""`tierkv simulate`, `advise` and `calibrate`: what they print, write and refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from text_models import save_text_model

from tierkv.cli.main import main
from tierkv.cli.simulate import alternatives
from tierkv.sim.generate import generate_trace
from tierkv.sim.hardware import load_hardware
from tierkv.sim.trace_writer import write_trace

TRACE = ["--trace", "agents", "--requests", "20", "--jobs", "1"]
SMALL = [*TRACE, "--tiers", "gpu=400blocks"]


@pytest.fixture
def foreign(tmp_path: Path) -> str:
    """A trace that somebody else wrote: fields that nobody knows, and a typo in line 3."""
    path = tmp_path / "theirs.jsonl"
    write_trace(generate_trace("agents", num_requests=30, max_context=4000), path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [json.dumps(line | {"region": "eu", "user_agent": None}) for line in lines]
    texts[2] = texts[2].replace('"input_length": ', '"input_length": o')
    path.write_text("\n".join(texts) + "\n")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_trace_with_a_typo_gives_a_message_and_a_result(
    foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(
        capsys, "simulate", "--trace", foreign, "--jobs", "1", "--tiers", "gpu=400blocks"
    )
    assert status == 0
    assert "theirs.jsonl:3" in err
    assert "29 requests ended" in out and "1 bad lines of the trace were skipped" in out


def test_too_many_bad_lines_end_it(foreign: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "simulate", "--trace", foreign, "--max-bad-lines", "0")
    assert status == 2 and "over 0 bad lines" in err


def test_results_are_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for name in ("a", "b"):
        status, out, _ = run(
            capsys, "simulate", *SMALL, "--eviction-policy", "lru,sieve", "--out",
            str(tmp_path / name),
        )  # fmt: skip
        assert status == 0 and "eviction_policy=sieve" in out
        texts.append((tmp_path / name / "results.json").read_bytes())
        assert (tmp_path / name / "hit_rate.png").stat().st_size > 1000
    assert texts[0] == texts[1]
    outcomes = json.loads(texts[0])["outcomes"]
    assert [o["case"]["eviction_policy"] for o in outcomes] == ["lru", "sieve"]
    assert all(0 < o["hit_rate"] <= o["optimum_hit_rate"] + 0.05 for o in outcomes)


def test_missing_plots_are_told_before_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(capsys, "simulate", *SMALL, "--out", str(tmp_path))
    assert status == 2 and not out and "--no-plots" in err
    status, out, _ = run(capsys, "simulate", *SMALL, "--out", str(tmp_path), "--no-plots")
    assert status == 0 and "written: " in out


def test_a_baseline_runs_beside(capsys: pytest.CaptureFixture[str]) -> None:
    tiers = ["--tiers", "gpu=400blocks,cpu=600blocks,nvme=900blocks"]
    status, out, _ = run(
        capsys, "simulate", *TRACE, *tiers, "--baseline", "vllm", "--admission", "second-hit",
        "--no-optimum", "--json",
    )  # fmt: skip
    assert status == 0
    vllm, ours = json.loads(out)["outcomes"]
    assert vllm["machine"]["blocks"] == {"gpu": 400, "cpu": 600}
    assert vllm["nvme_written_bytes"] == 0
    assert ours["machine"]["options"]["admission_policy"] == "second-hit"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--trace", "agent"], "chat, agents, rag, coding"),
        ([], "name a trace"),
        ([*SMALL, "--eviction-policy", "lur"], "unknown eviction policy"),
        ([*SMALL, "--hardware", "h300"], "choose one of"),
        ([*SMALL, "--model", "llama-9"], "neither a model directory"),
        ([*SMALL, "--model", "llama-3.1-405b"], "take more devices"),
        ([*SMALL, "--rate", "0"], "above 0"),
        ([*SMALL, "--requests", "0"], "at least 1"),
        ([*SMALL, "--coarsen", "24"], "multiple"),
        ([*SMALL, "--baseline", "sglang"], "choose one of vllm"),
        ([*SMALL, "--slo-ttft", "-1"], "above 0 seconds"),
    ],
)
def test_bad_options_are_told(
    flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "simulate", *flags)
    assert status == 2 and word in err


def test_lists_of_policies() -> None:
    assert alternatives(["lru,sieve", "lru"]) == ["lru", "sieve"]
    assert alternatives(["gpu=lru,cpu=s3fifo", "s3fifo:small=0.2"]) == [
        "gpu=lru,cpu=s3fifo",
        "s3fifo:small=0.2",
    ]


def test_advice_names_a_command_and_a_runner_up(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trace", "agents", "--requests", "6", "--jobs", "1"]
    tiers = ["--tiers", "gpu=400blocks,cpu=600blocks"]
    status, out, _ = run(capsys, "advise", *flags, *tiers)
    assert status == 0
    assert "tierkv serve --model llama-3.1-8b" in out and "runner-up" in out
    status, out, _ = run(capsys, "advise", *flags, *tiers, "--json")
    found: dict[str, Any] = json.loads(out)
    assert found["command"].startswith("tierkv serve") and len(found["tried"]) > 10
    best, second = (found[name]["goodput"] for name in ("best", "runner_up"))
    assert best >= 0.99 * second


def test_calibration_is_read_by_simulate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_text_model(tmp_path / "model"), tmp_path / "here.yaml"
    status, printed, _ = run(
        capsys, "calibrate", str(model), "--out", str(out), "--rounds", "1", "--max-model-len",
        "128", "--num-gpu-blocks", "64", "--nvme-path", str(tmp_path / "drive"),
    )  # fmt: skip
    assert status == 0 and "median" in printed
    assert list((tmp_path / "drive").iterdir()) == []
    figures = yaml.safe_load(out.read_text())
    assert figures["drive"]["read"] > 0 and figures["link"]["bandwidth"] > 0
    hardware = load_hardware(str(out))
    assert hardware.table is not None and hardware.measured_model == str(model)
    status, text, _ = run(
        capsys, "simulate", *SMALL, "--model", str(model), "--hardware", str(out),
        "--no-context-limit",
    )  # fmt: skip
    assert status == 0 and "20 requests" in text and "requests ended" in text


def test_calibrate_refuses_a_file_it_cannot_write(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "calibrate", "demo", "--out", "here.txt")
    assert status == 2 and ".yaml" in err
