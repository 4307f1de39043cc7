"""Models that the engine's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_models import save_text_model


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random Llama and a byte-level tokenizer."""
    return save_text_model(tmp_path_factory.mktemp("text-model"))
