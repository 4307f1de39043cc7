"""What every test shares: where the repository is, and a quiet environment."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, and
# torch's compiler imports it.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_kv_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers started by tests keep their blocks out of the user's cache."""
    folder = tmp_path_factory.mktemp("kv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERKV_KV_DIR", str(folder))
        yield
    shutil.rmtree(folder)  # gigabytes, by default


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository root: the folder with `pyproject.toml`."""
    return ROOT


@pytest.fixture(scope="session")
def servable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model, its tokenizer and a chat template."""
    from servable import save_servable  # loads torch; most tests do without

    return save_servable(tmp_path_factory.mktemp("servable"))


@pytest.fixture
def rng() -> random.Random:
    """A generator with a fresh seed, which a failing test shows; torch is seeded alike."""
    import torch  # most tests do without

    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
