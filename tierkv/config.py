"""Every engine option, once: `LLM(...)` keywords, CLI flags and YAML keys are these fields."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard

from tierkv.errors import ConfigError
from tierkv.types import TierName

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_MAX_THREADS = 1024
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "bool | None": (bool, NoneType),
    "float": (float, int),
    "str": (str,),
    "str | None": (str, NoneType),
}
"""What fields of these types take; those of integers have ranges and are checked by name."""


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


def parse_sizes(value: int | str, option: str) -> tuple[int, ...]:
    """`"4,1,2"` -> `(1, 2, 4)`: distinct whole numbers in order.

    Raises:
        ConfigError: something else is in the list, or it is empty.
    """
    words = [word.strip() for word in str(value).split(",")]
    if isinstance(value, bool) or not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(option, value, "give whole numbers of at least 1, such as 1,2,4,8")
    return tuple(sorted({int(word) for word in words}))


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A config field with the text its CLI flag shows; `choices`, `metavar` and `aliases` (further
    flags) may follow."""
    return field(default=default, metadata={"help": help, **metadata})


def check_choices(options: Any) -> None:
    """Raise ConfigError for the first field that is none of its choices, nor its default."""
    for f in dataclasses.fields(options):
        choices, value = f.metadata.get("choices"), getattr(options, f.name)
        if choices and value != f.default and value not in choices:
            raise ConfigError(f.name, value, f"choose one of {', '.join(choices)}")


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
    quantization: str | None = option(
        None, "weights in fewer bits: fp8 (GPUs of compute capability 8.9 on)", choices=("fp8",)
    )
    verify_model: bool = option(
        True, "probe 40 tokens against transformers' eager attention when loading"
    )
    num_threads: int | None = option(None, "CPU threads of the model; default: all cores allowed")
    tensor_parallel_size: int = option(
        1, "processes, each with a GPU, that share the model", aliases=("-tp",)
    )

    max_model_len: int | None = option(
        None, "longest prompt + output in tokens; default: the model's, as far as the pool allows"
    )
    block_size: int = option(16, "tokens per KV block: a power of two, 1..256")
    gpu_memory_utilization: float = option(0.9, "share of GPU memory to use (CUDA only)")
    kv_cache_memory: int | str | None = option(None, "bytes of the GPU pool, e.g. 2GiB")
    num_gpu_blocks: int | None = option(None, "blocks of the GPU pool (instead of bytes)")
    enable_prefix_caching: bool = option(True, "reuse computed blocks between requests")
    eviction_policy: str = option(
        "reuse", "which unreferenced block goes first; one for all tiers, or gpu=lru,cpu=s3fifo,..."
    )

    offload: str | None = option(
        None,
        "tiers below the pool: cpu,nvme or with sizes cpu=16GiB,nvme=200GiB:/path; auto: both, as"
        " far as they can be had (serve's default)",
    )
    cpu_cache_size: int | str | None = option(None, "bytes of the CPU tier, e.g. 16GiB")
    nvme_cache_size: int | str | None = option(None, "bytes of the NVMe tier, e.g. 200GiB")
    nvme_path: str | None = option(None, "directory of the NVMe tier")
    nvme_io: str = option(
        "posix",
        "what reads and writes the NVMe tier; kvikio needs CUDA",
        choices=("posix", "kvikio"),
    )
    admission_policy: str = option(
        "write-through", "what enters a lower tier; for all, or cpu=write-through,nvme=second-hit"
    )
    nvme_write_rate: int | str | None = option(None, "bytes per second written to NVMe, at most")
    preemption_mode: str = option("auto", "how to preempt: recompute, swap, auto")
    load_policy: str = option("auto", "for a hit below the pool: load, recompute, split, auto")
    prefetch_policy: str = option(
        "lookahead",
        "promote before its turn: none, queue (new requests), lookahead (swapped ones too)",
        choices=("none", "queue", "lookahead"),
    )
    pin_budget: int | str | None = option(
        None, "bytes that may be pinned, e.g. 8GiB; default: a quarter of the last tier"
    )
    load_timeout: float = option(10.0, "seconds after which a load counts as a miss")
    oversubscribe: bool = option(False, "run more sequences than fit, in turns, by swapping")
    time_slice: int = option(64, "tokens of one turn with oversubscribe")

    max_num_seqs: int = option(256, "sequences running at once, at most")
    max_num_batched_tokens: int = option(2048, "tokens in one step, at most (chunked prefill)")
    async_scheduling: bool | None = option(
        None, "plan and launch a step before the last one's tokens are read; default: on a GPU"
    )
    enforce_eager: bool = option(False, "no CUDA graphs for decode steps")
    cuda_graph_sizes: int | str | None = option(
        None, "batch sizes to capture: 1,2,4,8, or one number, the largest; default: up to 512"
    )
    scheduling_policy: str = option("fcfs", "order of waiting requests: fcfs, priority, lpm, fair")
    preemption_victim: str = option("latest", "whom to preempt: latest, priority, largest")

    def __post_init__(self) -> None:
        self.model = self._path("model", self.model)
        if self.tokenizer is not None:
            self.tokenizer = self._path("tokenizer", self.tokenizer)
        check_choices(self)
        self._check_integers()
        self._check_tiers()
        self._check_types()
        check_block_size(self.block_size)
        if self.cuda_graph_sizes is not None:
            parse_sizes(self.cuda_graph_sizes, "cuda_graph_sizes")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            fix = "must be above 0 and at most 1"
            raise ConfigError("gpu_memory_utilization", self.gpu_memory_utilization, fix)
        if self.kv_cache_memory is not None:
            self.kv_cache_memory = parse_bytes(self.kv_cache_memory, "kv_cache_memory")
            if self.num_gpu_blocks is not None:
                fix = "give either kv_cache_memory or num_gpu_blocks, not both"
                raise ConfigError("num_gpu_blocks", self.num_gpu_blocks, fix)

    def _check_tiers(self) -> None:
        for name in ("cpu_cache_size", "nvme_cache_size", "nvme_write_rate", "pin_budget"):
            if getattr(self, name) is not None:
                setattr(self, name, parse_bytes(getattr(self, name), name))
        if self.nvme_path is not None:
            self.nvme_path = self._path("nvme_path", self.nvme_path)
        if self.offload not in (None, "auto") and not self.enable_prefix_caching:
            fix = "lower tiers keep what prefix caching finds: leave enable_prefix_caching on"
            raise ConfigError("offload", self.offload, fix)
        if self.oversubscribe and self.offload is None:
            raise ConfigError("oversubscribe", True, "needs a tier to swap to: offload=cpu")
        if self.async_scheduling and self.tensor_parallel_size > 1:
            fix = "steps are not overlapped with tensor_parallel_size above 1: leave it out"
            raise ConfigError("async_scheduling", True, fix)
        share = self.load_timeout
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not share > 0:
            raise ConfigError("load_timeout", share, "must be a number of seconds above 0")

    def _check_integers(self) -> None:
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "num_gpu_blocks",
            "num_threads",
            "tensor_parallel_size",
            "time_slice",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "num_gpu_blocks", "num_threads"):
                continue
            if not _is_integer(value) or value < 1:
                raise ConfigError(name, value, "must be a whole number of at least 1")
        if self.num_threads is not None and self.num_threads > _MAX_THREADS:
            raise ConfigError("num_threads", self.num_threads, f"must be at most {_MAX_THREADS}")
        if not _is_integer(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "must be a whole number of 64 bits")

    def _check_types(self) -> None:
        """A "no" that counts as true, say, would be worse than an error."""
        for f in dataclasses.fields(self):
            value, kinds = getattr(self, f.name), _KINDS.get(str(f.type))
            if kinds is not None and type(value) not in kinds:
                words = " or ".join("nothing" if k is NoneType else k.__name__ for k in kinds)
                raise ConfigError(f.name, value, f"must be of type {words}")

    @staticmethod
    def _path(name: str, value: object) -> str:
        """A directory or hub id; a `pathlib.Path` becomes the string it stands for."""
        if not isinstance(value, (str, Path)) or not str(value):
            raise ConfigError(name, value, "must be a directory or a hub id")
        return str(value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from keyword-like options; unknown names raise, with the nearest known one."""
        check_names(values, [f.name for f in dataclasses.fields(cls)])
        return cls(**{name.replace("-", "_"): value for name, value in values.items()})


def per_tier(name: str, config: EngineConfig) -> dict[TierName, str]:
    """A policy option by tier: `lru` for all, or `gpu=lru,cpu=tinylfu:window=0.1,nvme=fifo`.

    Raises:
        ConfigError: a tier named twice, or a text that is neither form.
    """
    text: str = getattr(config, name)
    names = {f"{tier.value}=": tier for tier in TierName}
    found: dict[TierName, str] = {}
    tier: TierName | None = None
    for part in text.split(","):
        prefix = next((p for p in names if part.strip().startswith(p)), None)
        if prefix is not None:
            tier = names[prefix]
            if tier in found:
                raise ConfigError(name, text, f"names {tier.value} twice")
            found[tier] = part.strip().removeprefix(prefix)
        elif tier is not None:
            found[tier] += f",{part}"  # a further parameter of that tier's policy
    if not found:
        return dict.fromkeys(TierName, text)
    if not text.strip().startswith(tuple(names)):
        raise ConfigError(name, text, "give one policy, or tier=policy for each tier")
    default = next(f.default for f in dataclasses.fields(config) if f.name == name)
    return {t: found.get(t, str(default)) for t in TierName}


def check_block_size(size: int) -> None:
    """Raise ConfigError unless kernels can address blocks of so many tokens."""
    if not 1 <= size <= 256 or size & (size - 1):
        raise ConfigError("block_size", size, "must be a power of two from 1 to 256")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def check_names(values: Mapping[str, Any], known: list[str]) -> None:
    """Raise ConfigError for the first name in `values` that is not an option."""
    for name in values:
        if str(name).replace("-", "_") not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(str(name), values[name], f"unknown option{hint}")
