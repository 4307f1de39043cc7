"""Many models under one path: who stays, who goes, and that the bound holds on the disk."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from pathlib import Path

import pytest
from store_blocks import PAYLOAD_BYTES, key_of, read_back, write_of

from tierkv.errors import ConfigError
from tierkv.storage import directory, root
from tierkv.storage.base import DONE
from tierkv.storage.nvme_store import NvmeStore

MIB = 1 << 20
CAPACITY_BYTES = 40 * MIB


def open_it(path: Path, model: str, store_bytes: int | None = None) -> NvmeStore:
    return root.open_store(path, model, PAYLOAD_BYTES, CAPACITY_BYTES, store_bytes)


def du(path: Path) -> int:
    return int(subprocess.check_output(["du", "-s", "--block-size=1", str(path)]).split()[0])


def age(store: NvmeStore, seconds: float) -> None:
    """Let it be opened longer ago."""
    os.utime(store.path / "LOCK", (seconds, seconds))


def test_the_bound_holds_on_the_disk_when_everything_is_full(tmp_path: Path) -> None:
    store = open_it(tmp_path, "model a")
    assert du(tmp_path) <= CAPACITY_BYTES
    full = [write_of(slot, slot) for slot in range(store.capacity)]
    full = [type(w)(w.slot, w.key, w.parent, bytes(1024), w.payload) for w in full]
    assert store.write(full) == [DONE] * store.capacity
    assert du(tmp_path) <= CAPACITY_BYTES
    store.touch(range(store.capacity))
    store.close()
    assert 0.7 * CAPACITY_BYTES < du(tmp_path) <= CAPACITY_BYTES
    again = open_it(tmp_path, "model a")
    assert len(again.recover()) == store.capacity
    again.close()


def test_models_share_a_path_as_long_as_they_fit(tmp_path: Path) -> None:
    for model in ("a", "b", "a", "b"):
        store = open_it(tmp_path, model, 15 * MIB)
        store.write([write_of(0, ord(model))])
        store.close()
    for model in ("a", "b"):
        store = open_it(tmp_path, model, 15 * MIB)
        assert [block.key for block in store.recover()] == [key_of(ord(model))]
        store.close()
    assert du(tmp_path) <= CAPACITY_BYTES


def test_the_oldest_idle_sibling_goes_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    busy = open_it(tmp_path, "busy", 10 * MIB)
    stores = [open_it(tmp_path, model, 10 * MIB) for model in ("old", "young")]
    for seconds, store in enumerate([busy, *stores]):
        age(store, seconds)
    for store in stores:
        store.close()
    with caplog.at_level(logging.INFO):
        new = open_it(tmp_path, "new", 20 * MIB)
    left = {sibling.path for sibling in root.list_stores(tmp_path)}
    assert left == {busy.path, stores[1].path, new.path}
    assert f"{stores[0].path}: removed to make room" in caplog.text
    assert du(tmp_path) <= CAPACITY_BYTES
    new.close()
    busy.close()


def test_what_is_in_use_is_left_alone(tmp_path: Path) -> None:
    busy = open_it(tmp_path, "busy", 25 * MIB)
    busy.write([write_of(0, 0)])
    other = open_it(tmp_path, "other")  # takes what is left
    assert other.capacity < busy.capacity
    with pytest.raises(ConfigError, match=r"nvme_cache_size=.* beside stores in use"):
        open_it(tmp_path, "third")
    assert read_back(busy, 0, 0)[0] == DONE
    assert du(tmp_path) <= CAPACITY_BYTES
    busy.close()
    other.close()


def test_a_capacity_too_small_for_a_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nvme_cache_size=1000: leaves 1000 bytes"):
        root.open_store(tmp_path, "m", PAYLOAD_BYTES, 1000)


def test_other_files_under_the_root_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").write_bytes(b"meow")
    store = open_it(tmp_path, "a")
    (store.path / "note").write_text("keep")
    store.close()
    open_it(tmp_path, "b").close()
    assert (tmp_path / "photos" / "cat").read_bytes() == b"meow"
    assert (store.path / "note").read_text() == "keep"
    assert [path.name for path in store.path.iterdir()] == ["note"]


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"nvme_path=.*cannot be used"):
        root.open_store(tmp_path / "file", "m", PAYLOAD_BYTES, CAPACITY_BYTES)


def test_an_existing_root_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    store = open_it(tmp_path, "a")
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert store.path.stat().st_mode & 0o777 == 0o700
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away")
def test_a_store_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / root.store_name("a", PAYLOAD_BYTES)
    path.mkdir()
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="it belongs to another user"):
        open_it(tmp_path, "a")


def test_a_manifest_that_cannot_be_read_now_is_not_taken_for_a_lost_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_it(tmp_path, "a")
    store.write([write_of(0, 0)])
    store.close()

    def sick(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", sick)
        with pytest.raises(ConfigError, match="Input/output error"):
            open_it(tmp_path, "a")
    again = open_it(tmp_path, "a")
    assert read_back(again, 0, 0)[0] == DONE
    again.close()


def test_another_layout_is_a_sibling(tmp_path: Path) -> None:
    first = open_it(tmp_path, "a", 15 * MIB)
    second = root.open_store(tmp_path, "a", 2 * PAYLOAD_BYTES, CAPACITY_BYTES, 15 * MIB)
    assert first.path != second.path
    first.close()
    second.close()
    assert directory.disk_bytes(first.path) > 0
