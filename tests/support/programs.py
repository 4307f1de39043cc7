"""Running a benchmark program as its user would, only smaller."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any


def run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """The result that program `name` writes with `--quick`; the table can show it."""
    result = import_module(name).main(["--quick", "--out", str(folder), *options])
    written = json.loads((folder / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert {"benchmark", "command", "date", "cpu", "cores", "torch", "transformers"} <= set(written)
    rows = list(import_module("write_table").READERS[name](written))
    assert rows and all(figure and bool(target) == bool(met) for _, figure, target, met in rows)
    return dict(written)
