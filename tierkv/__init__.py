"""tierkv: a memory-tiered serving engine for language models.

Names are loaded when they are first used: `import tierkv` alone loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierkv.config import EngineConfig
    from tierkv.engine.async_llm import AsyncLLM
    from tierkv.engine.beam import BeamSearchParams
    from tierkv.engine.grammar_params import StructuredOutputsParams
    from tierkv.engine.kv_hints import KvHints
    from tierkv.engine.llm import LLM
    from tierkv.engine.outputs import CompletionOutput, RequestOutput
    from tierkv.engine.sampling_params import SamplingParams
    from tierkv.errors import (
        CapacityError,
        ConfigError,
        ConflictError,
        EngineDeadError,
        InvariantError,
        NotFoundError,
        QueueFullError,
        RequestError,
        TierkvError,
        UnsupportedModelError,
    )

__version__ = "0.1.0"

__all__ = [
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

_HOMES = {
    "AsyncLLM": "tierkv.engine.async_llm",
    "BeamSearchParams": "tierkv.engine.beam",
    "CompletionOutput": "tierkv.engine.outputs",
    "EngineConfig": "tierkv.config",
    "KvHints": "tierkv.engine.kv_hints",
    "LLM": "tierkv.engine.llm",
    "RequestOutput": "tierkv.engine.outputs",
    "SamplingParams": "tierkv.engine.sampling_params",
    "StructuredOutputsParams": "tierkv.engine.grammar_params",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'tierkv' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "tierkv.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
