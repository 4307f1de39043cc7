"""Programs around the simulator."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from programs import run


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
