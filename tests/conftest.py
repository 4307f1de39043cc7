"""What every test shares: where the repository is, and a quiet environment."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository root: the folder with `pyproject.toml`."""
    return ROOT


@pytest.fixture(scope="session")
def servable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model, its tokenizer and a chat template."""
    from servable import save_servable  # loads torch; most tests do without

    return save_servable(tmp_path_factory.mktemp("servable"))
