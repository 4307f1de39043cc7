"""The program for machines with a GPU would run: arguments, imports, the code of its sections."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


def suite() -> Any:
    return import_module("gpu.suite")


def dry_run(*sections: str) -> dict[str, Any]:
    arguments = ["--sections", ",".join(sections)] if sections else []
    found: dict[str, Any] = suite().main(["--dry-run", *arguments])["sections"]
    return found


@pytest.mark.full
def test_every_section_runs() -> None:
    found = dry_run()
    assert list(found) == list(suite().SECTIONS)
    assert not [name for name, entry in found.items() if suite().is_wrong(entry)]


def test_kernels_moves_and_engine_run() -> None:
    found = dry_run("limits", "correctness", "moved_bytes", "moves", "layout", "large_model")
    assert not [name for name, entry in found.items() if suite().is_wrong(entry)]
    for name, entry in found.items():
        rows = list(suite().SECTIONS[name].rows(entry["result"]))
        assert rows and all(len(row) == 4 for row in rows)


def test_a_wrong_result_is_a_failure() -> None:
    is_wrong = suite().is_wrong
    assert is_wrong({"failed": "RuntimeError: no"})
    assert is_wrong({"result": {"wrong": ["decode"]}})
    assert not is_wrong({"result": {"wrong": []}})
    assert not is_wrong({"left_out": "left out: 3 s were left"})


def test_a_kernel_that_does_not_write_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = import_module("tierkv.kernels.ops")
    monkeypatch.setattr(ops, "paged_attention", lambda *args, out, **options: out)
    found = dry_run("correctness")["correctness"]
    assert suite().is_wrong(found)


def test_an_unknown_section_is_named() -> None:
    with pytest.raises(SystemExit, match="--sections: 'fast' is none of limits"):
        suite().main(["--dry-run", "--sections", "fast"])


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite().torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run"):
        suite().main([])


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    sections = {"limits": {"result": {}}, "decode": {"failed": "no"}, "moves": {"left_out": "no"}}
    path.write_text(json.dumps({"sections": sections}))
    assert list(suite().earlier(path)) == ["limits"]
    assert suite().earlier(tmp_path / "none.json") == {}
