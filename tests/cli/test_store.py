"""`tierkv store`: every action, on whole, damaged and busy stores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from store_blocks import PAYLOAD_BYTES, key_of, open_nvme, write_of

from tierkv.cli.main import main
from tierkv.storage.nvme_store import NvmeStore
from tierkv.storage.record import slot_bytes
from tierkv.storage.root import open_store

MIB = 1 << 20


def open_it(root: Path, model: str = "model") -> NvmeStore:
    return open_store(root, model, PAYLOAD_BYTES, 64 * MIB, 9 * MIB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store with three blocks, the only one under its root."""
    store = open_it(tmp_path / "root")
    store.write([write_of(n, n) for n in range(3)])
    store.close()
    return store.path


def damage(path: Path, slot: int) -> None:
    with (path / "blocks.data").open("r+b") as file:
        file.seek(slot * slot_bytes(PAYLOAD_BYTES) + 5000)
        file.write(b"XX")


def test_ls_shows_each_store(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = open_it(path.parent, "another")
    assert main(["store", "ls", str(path.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [path.name, other.path.name]
    assert lines[1].endswith("nobody")
    assert lines[2].endswith(str(os.getpid()))
    other.close()


def test_stat_counts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "stat", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "payload per slot" in shown and "8 KiB" in shown
    assert [line.split()[-1] for line in shown.splitlines() if "hold a block" in line] == ["3"]


def test_verify_and_repair(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(path)]) == 0
    assert "3 whole" in capsys.readouterr().out
    damage(path, 1)
    assert main(["store", "verify", str(path.parent)]) == 1
    assert "1 damaged, 0 unreadable\n  slots: 1\n" in capsys.readouterr().out
    assert main(["store", "repair", str(path)]) == 0
    assert main(["store", "verify", str(path)]) == 0
    store = open_it(path.parent)
    assert [block.key for block in store.recover()] == [key_of(0), key_of(2)]
    store.close()


def test_a_store_in_use_is_left_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_it(path.parent)
    for action in ("verify", "repair"):
        assert main(["store", action, str(path)]) == 1
        assert f"process {os.getpid()} has it open" in capsys.readouterr().err
    assert main(["store", "clear", str(path)]) == 1
    assert "kept, because it is open" in capsys.readouterr().out
    store.close()


def test_clear_removes(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "clear", str(path.parent)]) == 0
    assert not path.exists()
    assert main(["store", "ls", str(path.parent)]) == 1
    assert "holds no store" in capsys.readouterr().err
    single = tmp_path / "single"
    open_nvme(single).close()
    assert main(["store", "clear", str(single)]) == 0
    assert not single.exists()
    assert not (tmp_path / "LOCK").exists()


def test_a_damaged_manifest_is_explained(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path / "MANIFEST").write_bytes(b"{}")
    assert main(["store", "ls", str(path.parent)]) == 0
    assert main(["store", "stat", str(path)]) == 1
    assert "MANIFEST cannot be read" in capsys.readouterr().err


def test_a_path_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "ls", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err
