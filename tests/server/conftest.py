from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_app import LiveApp, live_app

from tierkv.server.app import AppSettings

KEY = "test-key"


@pytest.fixture(scope="session")
def app(servable: Path) -> Iterator[LiveApp]:
    """The application on a real engine, shared by all tests of this folder."""
    settings = AppSettings(["tiny", "org/also-tiny"], api_key=KEY, max_sequences=12)
    with live_app(servable, settings, num_gpu_blocks=256, num_threads=1) as running:
        yield running
