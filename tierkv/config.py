"""Every engine option, once: `LLM(...)` keywords, CLI flags and YAML keys are these fields."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tierkv.errors import ConfigError

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_bytes(value: int | str, option: str) -> int:
    """Bytes from an integer or a string such as `2GiB`, `512MB` (10^6) or `1.5G`.

    Raises:
        ConfigError: not a size, or not above zero.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.match(str(value))
        if match is None:
            raise ConfigError(option, value, "give bytes or a size such as 2GiB, 512MiB or 1.5GB")
        number, prefix, binary = match.groups()
        base = 1024 if binary or not str(value).strip().lower().endswith("b") else 1000
        size = int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
    if size <= 0:
        raise ConfigError(option, value, "must be above zero")
    return size


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A config field with the text its CLI flag shows; `choices` and `metavar` may follow."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """Options of the engine. Sizes take integers (bytes) or strings such as "2GiB".

    Raises:
        ConfigError: naming the option, its value and what to do instead.
    """

    model: str = option("demo", "built-in `demo`, a Hugging Face directory, or a hub id")
    tokenizer: str | None = option(None, "tokenizer directory or id, if not the model's")
    revision: str | None = option(None, "revision of a hub model")
    trust_remote_code: bool = option(False, "run code that the model repository ships")
    load_format: str = option(
        "auto", "`dummy` makes random weights from the config", choices=("auto", "dummy")
    )
    dtype: str = option("auto", "weights and activations; auto is the model's own", choices=_DTYPES)
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of dummy weights and of unseeded requests")
    verify_model: bool = option(
        True, "probe 40 tokens against transformers' eager attention when loading"
    )
    num_threads: int | None = option(None, "CPU threads of the model; default: all cores allowed")

    max_model_len: int | None = option(
        None, "longest prompt + output in tokens; default: the model's, as far as the pool allows"
    )
    block_size: int = option(16, "tokens per KV block: a power of two, 1..256")
    gpu_memory_utilization: float = option(0.9, "share of GPU memory to use (CUDA only)")
    kv_cache_memory: int | str | None = option(None, "bytes of the GPU pool, e.g. 2GiB")
    num_gpu_blocks: int | None = option(None, "blocks of the GPU pool (instead of bytes)")
    enable_prefix_caching: bool = option(True, "reuse computed blocks between requests")
    eviction_policy: str = option("lru", "which unreferenced block goes first: lru, fifo, lfu")

    max_num_seqs: int = option(256, "sequences running at once, at most")
    max_num_batched_tokens: int = option(2048, "tokens in one step, at most (chunked prefill)")
    scheduling_policy: str = option("fcfs", "order of waiting requests: fcfs, priority, lpm")
    preemption_victim: str = option("latest", "whom to preempt: latest, priority, largest")

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_integers()
        size = self.block_size
        if not 1 <= size <= 256 or size & (size - 1):
            raise ConfigError("block_size", size, "must be a power of two from 1 to 256")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            fix = "must be above 0 and at most 1"
            raise ConfigError("gpu_memory_utilization", self.gpu_memory_utilization, fix)
        if self.kv_cache_memory is not None:
            self.kv_cache_memory = parse_bytes(self.kv_cache_memory, "kv_cache_memory")
            if self.num_gpu_blocks is not None:
                fix = "give either kv_cache_memory or num_gpu_blocks, not both"
                raise ConfigError("num_gpu_blocks", self.num_gpu_blocks, fix)

    def _check_choices(self) -> None:
        for f in dataclasses.fields(self):
            choices = f.metadata.get("choices")
            if choices and getattr(self, f.name) not in choices:
                raise ConfigError(
                    f.name, getattr(self, f.name), f"choose one of {', '.join(choices)}"
                )

    def _check_integers(self) -> None:
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "num_gpu_blocks",
            "num_threads",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "num_gpu_blocks", "num_threads"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(name, value, "must be a whole number of at least 1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from keyword-like options; unknown names raise, with the nearest known one."""
        check_names(values, [f.name for f in dataclasses.fields(cls)])
        return cls(**{name.replace("-", "_"): value for name, value in values.items()})


def check_names(values: Mapping[str, Any], known: list[str]) -> None:
    """Raise ConfigError for the first name in `values` that is not an option."""
    for name in values:
        if name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(name, values[name], f"unknown option{hint}")
