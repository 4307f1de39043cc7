"""docs/flags.md says what the options are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tierkv.cli import foreign


def test_it_is_what_the_script_writes(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "write_flags_doc", repository / "scripts/write_flags_doc.py"
    )
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (repository / "docs/flags.md").read_text(encoding="utf-8")
    assert text == script.document(), "run: python scripts/write_flags_doc.py"


def test_it_names_every_flag_of_other_servers(repository: Path) -> None:
    text = (repository / "docs/flags.md").read_text(encoding="utf-8")
    assert all(f"`{flag}`" in text for flag in foreign.all_flags())
