"""What `import tierkv` offers, and what it must not cost."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import tierkv

EXPORTS = [
    "AsyncLLM",
    "BeamSearchParams",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "ConflictError",
    "EngineConfig",
    "EngineDeadError",
    "InvariantError",
    "KvHints",
    "LLM",
    "NotFoundError",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TierkvError",
    "UnsupportedModelError",
    "__version__",
]


def test_the_list_of_exports_is_pinned() -> None:
    assert tierkv.__all__ == EXPORTS
    assert dir(tierkv) == sorted(EXPORTS)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_resolves_to_its_own_name(name: str) -> None:
    value = getattr(tierkv, name)
    assert getattr(value, "__name__", name) == name
    if isinstance(value, type):
        assert value.__doc__


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = tierkv.Engine  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from tierkv import Engine  # type: ignore[attr-defined]  # noqa: F401


def test_the_version_is_the_distribution_s() -> None:
    assert tierkv.__version__ == importlib.metadata.version("tierkv")


@pytest.mark.parametrize(
    "statement",
    [
        "import tierkv",
        "from tierkv import SamplingParams, EngineConfig, RequestError, RequestOutput",
        "from tierkv import AsyncLLM, LLM, BeamSearchParams",
        "import tierkv.engine.client, tierkv.engine.process",
    ],
)
def test_importing_loads_no_torch(statement: str) -> None:
    program = f"{statement}; import sys; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
