"""The programs importable, their models in a temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def _programs(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pytest.MonkeyPatch]:
    """The programs importable, their models in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        patch.setenv("PYTHONPATH", str(repository / "benchmarks"))
        patch.setenv("TIERKV_BENCH_DIR", str(tmp_path_factory.mktemp("models")))
        yield patch
