"""What an NVMe tier takes when nobody says how much: several models share a disk."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tierkv.engine.tiers as tiers
from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool
from tierkv.config import EngineConfig
from tierkv.engine.core import LowerTierSetup
from tierkv.engine.cost import MeasuredCost
from tierkv.errors import ConfigError
from tierkv.storage.root import list_stores, store_name
from tierkv.types import TierName

MIB = 1 << 20
DISK = 640 * MIB
"""Free on the disk at first; it is only thought to be so small."""
LAYOUT = KVLayout(2, 2, 16, 16, "float32")
OWN, ALL = DISK // 10, DISK // 2

_seconds = itertools.count(1)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def disk_usage(path: Path) -> Any:
        taken = sum(tiers.disk_bytes(store.path) for store in list_stores(tmp_path))
        return type("Usage", (), {"free": DISK - taken})

    monkeypatch.setattr(tiers.shutil, "disk_usage", disk_usage)
    return tmp_path


def start(disk: Path, model: str, offload: str = "nvme") -> LowerTierSetup:
    pool = GpuPool(LAYOUT, 8, torch.device("cpu"))
    config = EngineConfig(offload=offload, nvme_path=str(disk))
    setup = tiers.open_tiers(config, LAYOUT, model.encode(), pool, MeasuredCost(LAYOUT.slot_bytes))
    assert setup is not None
    assert [spec.name for spec in setup.specs] == [TierName.NVME]
    return setup


def run(disk: Path, model: str, offload: str = "nvme") -> Path:
    """Start and stop the model, a second after all before; the directory of its store."""
    start(disk, model, offload).close()
    fingerprint = f"{model.encode().hex()}-{LAYOUT.fingerprint}"
    path = disk / store_name(fingerprint, LAYOUT.slot_bytes)
    opened_s = next(_seconds)
    os.utime(path / "LOCK", (opened_s, opened_s))
    return path


def taken(disk: Path) -> int:
    return sum(tiers.disk_bytes(store.path) for store in list_stores(disk))


def test_a_second_model_leaves_the_first_one_s_store_alone(disk: Path) -> None:
    first, second = run(disk, "a"), run(disk, "b")
    assert first != second
    assert run(disk, "a") == first
    assert {store.path for store in list_stores(disk)} == {first, second}
    for path in (first, second):
        assert 0.7 * OWN < tiers.disk_bytes(path) <= OWN


def test_together_they_take_half_of_the_disk_and_the_oldest_goes_first(disk: Path) -> None:
    paths = [run(disk, model) for model in "abcde"]
    assert run(disk, "a") == paths[0], "it is not the oldest any more"
    assert {store.path for store in list_stores(disk)} == set(paths)
    newest = run(disk, "f")
    assert {store.path for store in list_stores(disk)} == {newest, *paths} - {paths[1]}
    assert taken(disk) <= ALL


def test_a_store_in_use_stays(disk: Path) -> None:
    busy = start(disk, "busy", "nvme=250MiB")
    others = [run(disk, model) for model in "abc"]
    left = {store.path for store in list_stores(disk)}
    assert others[0] not in left and others[2] in left
    assert taken(disk) <= ALL
    busy.close()


def test_what_others_in_use_leave_over_must_hold_a_block(disk: Path) -> None:
    busy = start(disk, "busy", "nvme=400MiB")
    with pytest.raises(ConfigError, match="leaves 0 bytes beside stores in use"):
        start(disk, "a")
    busy.close()


def test_a_size_bounds_all_stores(disk: Path) -> None:
    run(disk, "a")
    path = run(disk, "b", "nvme=100MiB")
    assert [store.path for store in list_stores(disk)] == [path]
    assert 70 * MIB < taken(disk) <= 100 * MIB
