"""A real model over a store that is sick: no wrong token, no hang, and well again by itself.

Every engine answers the same prompts, healthy, sick and healthy again. Its pool holds few of them,
so most of each is read from the store. The reference is an engine with one tier.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sick_tiers import NUM_PROMPTS, SparseIo, Ward, serve

from tierkv.cli.main import main
from tierkv.engine.core import EngineCore
from tierkv.errors import ConfigError, EngineDeadError
from tierkv.storage.faults import Fault, FaultPlan
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.lock import holder

ALL, HALF = range(NUM_PROMPTS), range(0, NUM_PROMPTS, 2)


def store_below(path: Path) -> Path:
    (found,) = [child for child in path.iterdir() if child.is_dir()]
    return found


def wait_until_free(path: Path) -> None:
    """An engine that was closed has let its store go."""
    end = time.monotonic() + 20
    while holder(store_below(path)) != "nobody":
        assert time.monotonic() < end
        time.sleep(0.05)


def failures(core: EngineCore) -> dict[str, int]:
    """By cause, how many moves failed."""
    prefix = "move_failures_"
    found = core.metrics().items()
    return {name.removeprefix(prefix): n for name, n in found if n and name.startswith(prefix)}


def moves(core: EngineCore) -> tuple[int, int]:
    """How many moves down and up arrived."""
    found = core.metrics()
    return found.get("moves_gpu_nvme", 0), found.get("moves_nvme_gpu", 0)


def check_recovery(ward: Ward, core: EngineCore, expected: dict[int, list[int]]) -> None:
    """The device is well: within some pauses blocks go down and come up again."""
    ward.release()
    before, end = moves(core), time.monotonic() + 20
    while True:
        assert ward.play(core, ALL) == expected
        ward.settle(core)
        guard, now = ward.guards[-1], moves(core)
        is_well = not guard.reads.is_quarantined and not guard.writes.is_quarantined
        if is_well and now[0] > before[0] and now[1] > before[1]:
            return
        assert time.monotonic() < end, (before, now, failures(core))
        core.reset_prefix_cache()  # so that there is something to write
        time.sleep(0.05)


def check_restart(
    ward: Ward,
    model: Path,
    store: Path,
    expected: dict[int, list[int]],
    is_torn: bool = False,
) -> None:
    """Another engine on the same store finds nothing wrong there; what the device has torn and
    nobody has read since can be found, and repaired."""
    core = ward.engine(model, store)
    assert ward.play(core, ALL) == expected
    core.close()
    assert main(["store", "verify", str(store)]) == 0 or is_torn
    if is_torn:
        assert main(["store", "repair", str(store)]) == 0
        assert main(["store", "verify", str(store)]) == 0
        core = ward.engine(model, store)
        assert ward.play(core, ALL) == expected
        core.close()


CASES: dict[str, tuple[dict[Fault, float], set[str], set[str]]] = {
    "errors": ({Fault.ERROR: 1.0}, {"io_error", "unavailable"}, {"reads", "writes"}),
    "some errors": ({Fault.ERROR: 0.3}, {"io_error"}, set()),
    "short reads": ({Fault.SHORT_READ: 1.0}, {"lost"}, {"reads"}),
    "bit flips": ({Fault.BIT_FLIP: 1.0}, {"corrupt"}, {"reads"}),
    "some bit flips": ({Fault.BIT_FLIP: 0.3}, {"corrupt"}, set()),
    "torn writes": ({Fault.TORN_WRITE: 1.0}, {"corrupt"}, set()),
    "full": ({Fault.NO_SPACE: 1.0}, {"no_space", "unavailable"}, {"writes"}),
    "stalls": ({Fault.STALL: 1.0}, {"late"}, {"reads", "writes"}),
    "everything": (dict.fromkeys(Fault, 0.1), set(), set()),
}
ALONE, BOTH = "nvme=64MiB", "cpu=128KiB,nvme=64MiB"
IN_BRIEF = ("everything", "torn writes")


@pytest.mark.parametrize(
    ("case", "offload"),
    [
        *((case, ALONE) for case in CASES),
        *((case, BOTH) for case in IN_BRIEF),
        *(
            pytest.param(case, BOTH, marks=pytest.mark.full)
            for case in CASES
            if case not in IN_BRIEF
        ),
    ],
)
def test_a_sick_device(
    case: str,
    offload: str,
    ward: Ward,
    model: Path,
    expected: dict[int, list[int]],
    tmp_path: Path,
) -> None:
    rates, causes, quarantined = CASES[case]
    core = ward.engine(model, tmp_path, offload)
    assert ward.play(core, HALF) == {number: expected[number] for number in HALF}
    assert ward.settle(core)
    assert failures(core) == {} and ward.was_quarantined == set()
    ward.plan = FaultPlan(rates=rates, seed=len(case), stall_s=0.5)
    assert ward.play(core, ALL) == expected
    assert ward.play(core, ALL) == expected
    ward.settle(core)
    found = failures(core)
    assert found and causes <= found.keys(), found
    if offload == ALONE:
        assert quarantined <= ward.was_quarantined
        check_recovery(ward, core, expected)
    ward.release()
    core.close()
    check_restart(ward, model, tmp_path, expected, is_torn=Fault.TORN_WRITE in rates)


def test_a_device_that_may_not_be_touched_any_more(
    ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    """Permission lost, on whatever: the calls say so (an open file would not notice)."""
    core = ward.engine(model, tmp_path)
    assert ward.play(core, HALF) == {number: expected[number] for number in HALF}

    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied")

    ward.interfere = refuse
    store_below(tmp_path).chmod(0)
    assert ward.play(core, ALL) == expected
    assert failures(core)["io_error"] > 0
    assert ward.was_quarantined == {"reads", "writes"}
    check_recovery(ward, core, expected)
    core.close()
    check_restart(ward, model, tmp_path, expected)


def test_the_file_is_truncated(
    ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    core = ward.engine(model, tmp_path)
    assert ward.play(core, ALL) == expected
    assert ward.settle(core)
    os.truncate(store_below(tmp_path) / "blocks.data", 0)
    assert ward.play(core, ALL) == expected
    assert failures(core).keys() & {"lost", "corrupt"}
    check_recovery(ward, core, expected)
    core.close()
    check_restart(ward, model, tmp_path, expected)


@pytest.mark.parametrize("what", ["blocks.data", "index.sqlite", "all"])
def test_files_are_deleted(
    what: str, ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    core = ward.engine(model, tmp_path)
    assert ward.play(core, ALL) == expected
    assert ward.settle(core)
    if what == "all":
        shutil.rmtree(store_below(tmp_path))
    else:
        (store_below(tmp_path) / what).unlink()
    up = moves(core)[1]
    assert ward.play(core, ALL) == expected
    assert moves(core)[1] > up, "an open file can be read"
    core.reset_prefix_cache()
    assert ward.play(core, ALL) == expected
    ward.settle(core)
    if what != "index.sqlite":
        assert failures(core)["io_error"] > 0
        assert ward.was_quarantined == {"writes"}
    core.close()
    check_restart(ward, model, tmp_path, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m,mode=0700", "tierkv-test", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_fills_up(
    small_disk: Path, model: Path, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file on a real file system: writes fail, reads go on."""
    ward = Ward(monkeypatch, SparseIo)
    store = small_disk / "kv"
    core = ward.engine(model, store)
    assert ward.play(core, HALF) == {number: expected[number] for number in HALF}
    ward.settle(core)
    with pytest.raises(OSError), (small_disk / "other").open("wb") as other:
        while True:
            other.write(bytes(4096))
            other.flush()
    up = moves(core)[1]
    assert ward.play(core, ALL) == expected
    assert ward.play(core, ALL) == expected
    assert failures(core)["no_space"] > 0
    assert moves(core)[1] > up, "what is there can be read"
    assert "writes" in ward.was_quarantined
    (small_disk / "other").unlink()
    check_recovery(ward, core, expected)
    core.close()
    check_restart(ward, model, store, expected)


def test_a_disk_that_is_full_at_the_start(
    small_disk: Path, model: Path, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ward = Ward(monkeypatch)
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(ConfigError) as caught:
        ward.engine(model, small_disk / "kv", "nvme=1GiB")
    assert caught.value.option == "nvme_cache_size"
    assert "bytes more" in caught.value.fix
    core = ward.engine(model, small_disk / "kv", "auto", nvme_cache_size="1GiB")
    assert core.cache.lower is not None and len(core.cache.lower.specs) == 1
    assert serve(core, list(ALL)) == expected
    core.close()
    assert free - shutil.disk_usage(small_disk).free < 1 << 20, "nothing is left of the attempts"


def test_a_size_that_is_refused_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems keep what they had allocated when they noticed that it was too much."""
    PosixIo(tmp_path / "file", 8192).close()
    allocate = os.posix_fallocate

    def too_much(fd: int, offset: int, count: int) -> None:
        allocate(fd, offset, count // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", too_much)
    with pytest.raises(OSError, match="No space"):
        PosixIo(tmp_path / "file", 1 << 20)
    assert (tmp_path / "file").stat().st_size == 8192
    assert (tmp_path / "file").stat().st_blocks * 512 <= 16384


# ---------------------------------------------------------------------- disks that do not answer


def test_a_disk_that_does_not_answer_delays_few(
    ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    """Who waits for it when it stops computes after `load_timeout`; nobody waits from then on."""
    core = ward.engine(model, tmp_path)
    assert ward.play(core, ALL) == expected
    assert ward.settle(core)
    ward.stick("read")
    start = time.monotonic()
    assert ward.play(core, ALL) == expected
    assert ward.play(core, ALL) == expected
    assert time.monotonic() - start < 4 * 0.3 + 4, "as many timeouts as there are requests"
    assert failures(core)["late"] > 0
    check_recovery(ward, core, expected)
    assert not core.cache.moves.stalled  # type: ignore[union-attr]
    core.close()


def test_writes_that_do_not_end_hold_nobody_up(
    ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    """With a tier in between, whose copies are read; what finds no room there is dropped."""
    core = ward.engine(model, tmp_path, BOTH)
    ward.stick("write")
    for _ in range(3):
        assert ward.play(core, ALL) == expected
    assert core.metrics()["moves_in_flight"] > 0
    ward.release()
    assert ward.settle(core)
    assert core.metrics()["moves_cpu_nvme"] > 0
    core.close()
    check_restart(ward, model, tmp_path, expected)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_disk_that_does_not_answer_starves_nobody(
    what: str, mode: str, ward: Ward, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    """Without a tier in between: what is on its way to it or from it keeps no place in the pool."""
    small = {"num_gpu_blocks": 32, "preemption_mode": mode, "admission_policy": "write-through"}
    swaps = {"oversubscribe": True, "time_slice": 2} if mode == "swap" else {}
    core = ward.engine(model, tmp_path, ALONE, **small, **swaps)
    if what == "read":
        assert ward.play(core, ALL) == expected
        assert ward.settle(core)
    ward.stick(what)
    for _ in range(3):
        assert ward.play(core, ALL) == expected
    found = core.metrics()
    assert found["moves_in_flight"] > 0, "the disk is stuck"
    assert found["gpu_blocks_used"] == 0
    assert mode == "recompute" or found["preemptions"] > 0, "nobody's turn ended"
    start = time.monotonic()
    core.close()
    assert time.monotonic() - start < 5
    ward.release()
    wait_until_free(tmp_path)
    check_restart(ward, model, tmp_path, expected)


@pytest.mark.parametrize("what", ["read", "write"])
def test_closing_over_a_disk_that_does_not_answer(
    what: str,
    ward: Ward,
    model: Path,
    expected: dict[int, list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is left behind; once it answers, or the process ends, the store can be opened again."""
    core = ward.engine(model, tmp_path, BOTH)
    if what == "read":
        assert ward.play(core, ALL) == expected
        assert ward.settle(core)
    ward.stick(what)
    assert ward.play(core, ALL) == expected
    start = time.monotonic()
    core.close()
    core.close()
    assert time.monotonic() - start < 5
    assert "does not answer" in caplog.text
    ward.release()
    wait_until_free(tmp_path)
    check_restart(ward, model, tmp_path, expected)


# ---------------------------------------------------------------------- bugs


def test_a_bug_in_the_mover_is_loud_and_lets_the_store_go(
    ward: Ward, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = ward.engine(model, tmp_path)

    def fail(batch: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ward.guards[-1], "write", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        ward.play(core, ALL)
        ward.settle(core)
    with pytest.raises((RuntimeError, EngineDeadError)):
        ward.play(core, ALL)
    core.close()
    assert holder(store_below(tmp_path)) == "nobody"


def test_a_bug_that_shows_at_the_end_lets_the_store_go(
    ward: Ward, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = ward.engine(model, tmp_path)
    ward.stick("write")
    ward.play(core, [0, 1])

    def fail(batch: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ward.guards[-1], "write", fail)
    threading.Timer(0.1, ward.release).start()
    with pytest.raises(RuntimeError, match="a bug"):
        core.close()
    assert holder(store_below(tmp_path)) == "nobody"
