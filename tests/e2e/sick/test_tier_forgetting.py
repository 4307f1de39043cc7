"""`reset_prefix_cache` over a store that is sick: what it says is true."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sick_tiers import NUM_PROMPTS, Ward

from tierkv.engine.core import EngineCore
from tierkv.storage.faults import Fault, FaultPlan

ALL = range(NUM_PROMPTS)
BOTH = "cpu=128KiB,nvme=64MiB"


def test_forgetting_while_blocks_move(
    ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    core = ward.engine(model, tmp_path)
    ward.plan = FaultPlan(rates={Fault.STALL: 1.0}, stall_s=0.05)
    assert ward.play(core, ALL) == expected
    assert core.metrics()["moves_in_flight"] > 0
    assert core.reset_prefix_cache()
    before = core.metrics()["hit_tokens"]
    ward.play(core, [0])
    assert core.metrics()["hit_tokens"] == before
    assert core.reset_prefix_cache()
    core.close()
    core = ward.engine(model, tmp_path)
    assert core.metrics()["nvme_blocks"] == core.metrics()["nvme_blocks_free"]
    core.close()


def stored(core: EngineCore) -> int:
    found = core.metrics()
    return int(found["nvme_blocks"] - found["nvme_blocks_free"])


def test_forgetting_over_a_disk_that_refuses(
    ward: Ward,
    model: Path,
    expected: dict[int, list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is not done until it is durable: it says so, and a restart shows why that matters."""
    core = ward.engine(model, tmp_path)
    assert ward.play(core, ALL) == expected
    assert ward.settle(core) and stored(core) > 0
    ward.plan = FaultPlan(rates={Fault.ERROR: 1.0})
    assert not core.reset_prefix_cache()
    assert "the prefix cache was reset, but on disk" in caplog.text and "io_error" in caplog.text
    found = core.metrics()
    assert found["erase_failures"] > 0 and found["erasures_open"] > 0 and stored(core) == 0
    ward.release()
    assert core.reset_prefix_cache()
    assert core.metrics()["erasures_open"] == 0
    core.close()
    core = ward.engine(model, tmp_path)
    assert stored(core) == 0, "nothing has come back"
    core.close()


def test_what_could_not_be_erased_is_erased_later(
    ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    """By the engine itself, when the device is well."""
    core = ward.engine(model, tmp_path)
    assert ward.play(core, ALL) == expected
    assert ward.settle(core)
    ward.plan = FaultPlan(rates={Fault.ERROR: 1.0})
    assert not core.reset_prefix_cache()
    ward.release()
    assert core.metrics()["erasures_open"] > 0
    end = time.monotonic() + 20
    while core.metrics()["erasures_open"]:
        core.work_in_background()
        time.sleep(0.01)
        assert time.monotonic() < end
    core.close()
    core = ward.engine(model, tmp_path)
    assert stored(core) == 0
    core.close()


def test_closing_tries_once_more(
    ward: Ward,
    model: Path,
    expected: dict[int, list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    core = ward.engine(model, tmp_path)
    assert ward.play(core, ALL) == expected
    assert ward.settle(core)
    ward.plan = FaultPlan(rates={Fault.ERROR: 1.0})
    assert not core.reset_prefix_cache()
    caplog.clear()
    ward.release()
    core.close()
    assert "was reset" not in caplog.text
    core = ward.engine(model, tmp_path)
    assert stored(core) == 0
    assert ward.play(core, ALL) == expected
    ward.plan = FaultPlan(rates={Fault.ERROR: 1.0})
    assert not core.reset_prefix_cache()
    caplog.clear()
    core.close()
    assert "the prefix cache was reset, but on disk" in caplog.text


def test_forgetting_over_a_disk_that_stops_to_answer(
    ward: Ward,
    model: Path,
    expected: dict[int, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tierkv.engine.core._RESET_S", 0.2)
    core = ward.engine(model, tmp_path)
    assert ward.play(core, ALL) == expected
    assert ward.settle(core)
    ward.stick("write")
    start = time.monotonic()
    assert not core.reset_prefix_cache()
    assert time.monotonic() - start < 2
    assert stored(core) == 0 and core.metrics()["erasures_open"] > 0
    assert ward.play(core, ALL) == expected
    ward.release()
    assert ward.settle(core)
    assert core.metrics()["erasures_open"] == 0
    core.close()


def test_forgetting_over_a_disk_that_does_not_answer(
    ward: Ward,
    model: Path,
    expected: dict[int, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says no, and the engine goes on."""
    monkeypatch.setattr("tierkv.engine.core._RESET_S", 0.2)
    core = ward.engine(model, tmp_path, BOTH)
    ward.stick("write")
    assert ward.play(core, ALL) == expected
    assert not core.reset_prefix_cache()
    assert ward.play(core, ALL) == expected
    ward.release()
    assert ward.settle(core)
    assert core.reset_prefix_cache()
    core.close()
