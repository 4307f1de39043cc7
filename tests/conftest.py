"""What every test shares: where the repository is, and a quiet environment."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository root: the folder with `pyproject.toml`."""
    return ROOT
