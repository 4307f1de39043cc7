"""Where every byte of a block is: the map from layer to keys and values, and its fingerprint.

A block is `[num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]` of one dtype, one contiguous
byte range. Torch-free, so that `tierkv plan` and the simulator can use it on any config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tierkv.errors import ConfigError, UnsupportedModelError

ALIGNMENT = 4096
"""Slots and strides of the lower tiers are padded to this many bytes (O_DIRECT, page size)."""

DTYPE_BITS = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "int8": 8,
    "int4": 4,
}
"""KV dtypes a block may be stored in, and their bits per element."""

_FORMAT = "tierkv-layout-1"
_FULL_LAYERS = ("full_attention", "global", "attention", "dense", "moe")


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where one layer's keys and values lie in a block.

    Attributes:
        group: which group of equally shaped layers; the pool has one tensor per group.
        offset_bytes: from the start of the group's share of the block to the layer's keys; the
            values follow the keys.
        key_shape, value_shape: `(num_kv_heads, block_size, head_dim)`.
    """

    group: int
    offset_bytes: int
    key_shape: tuple[int, int, int]
    value_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a model's KV cache, in blocks.

    Attributes:
        num_layers: layers that keep KV.
        num_kv_heads: key/value heads of each (1 for multi-query attention).
        head_dim: elements of one head's key, and of its value.
        block_size: tokens per block.
        dtype: name of the element type, a key of `DTYPE_BITS`.
        windows: per layer, how many of the latest tokens a token sees (itself included), or None
            for all; empty stands for "no layer has a window".
        shard: tensor-parallel rank and size as `rank/size`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    windows: tuple[int | None, ...] = field(default=(), compare=False)
    shard: str = "0/1"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise ConfigError("dtype", self.dtype, f"choose one of {', '.join(DTYPE_BITS)}")
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        if self.windows and len(self.windows) != self.num_layers:
            fix = f"needs one entry for each of the {self.num_layers} layers"
            raise ConfigError("windows", self.windows, fix)

    @classmethod
    def from_config(cls, config: object, block_size: int, dtype: str) -> KVLayout:
        """Derive the layout from a Hugging Face config (an object or the parsed `config.json`).

        Args:
            config: with `text_config` nested or not; MHA, GQA or MQA; head_dim given or derived.
            block_size: tokens per block.
            dtype: KV element type, a key of `DTYPE_BITS`.

        Raises:
            UnsupportedModelError: the config describes no attention with a KV cache.
        """
        fields = _Fields(config)
        num_layers = fields.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        num_heads = fields.number("num_attention_heads", "n_head", "n_heads", "num_heads")
        return cls(
            num_layers=num_layers,
            num_kv_heads=_num_kv_heads(fields, num_heads),
            head_dim=_head_dim(fields, num_heads),
            block_size=block_size,
            dtype=dtype,
            windows=layer_windows(config, num_layers),
        )

    @property
    def num_shards(self) -> int:
        """How many ranks share the model's KV."""
        return int(self.shard.partition("/")[2])

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return int(self.shard.partition("/")[0])

    @property
    def shards(self) -> list[KVLayout]:
        """The layouts of all ranks, this one's among them."""
        count = self.num_shards
        return [replace(self, shard=f"{rank}/{count}") for rank in range(count)]

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return self.block_bytes // self.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in the GPU pool (no padding)."""
        return self.num_layers * 2 * self._plane_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one block's slot in a lower tier: padded to 4 KiB."""
        return -(-self.block_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def _plane_bytes(self) -> int:
        """Bytes of one layer's keys (or values) in one block."""
        elements = self.num_kv_heads * self.block_size * self.head_dim
        return -(-elements * DTYPE_BITS[self.dtype] // 8)

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`(num_layers, 2, num_kv_heads, block_size, head_dim)`."""
        return self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim

    def place(self, layer: int) -> LayerPlace:
        """Where `layer`'s keys and values lie."""
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer {layer} of {self.num_layers}")
        shape = (self.num_kv_heads, self.block_size, self.head_dim)
        return LayerPlace(0, layer * 2 * self._plane_bytes, shape, shape)

    @property
    def common_window(self) -> int | None:
        """The largest window when every layer has one: blocks behind it are never read again."""
        if not self.windows or None in self.windows:
            return None
        return max(window for window in self.windows if window is not None)

    @property
    def fingerprint(self) -> str:
        """Hex digest of what makes stored bytes readable: format, dtype, shape, shard."""
        shape = "x".join(str(size) for size in self.block_shape)
        text = f"{_FORMAT}|{self.dtype}|{shape}|{self.shard}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


def layer_windows(config: object, num_layers: int | None = None) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens (None: sees everything), as transformers applies it.

    Raises:
        UnsupportedModelError: a layer's kind is neither full nor sliding attention.
    """
    fields = _Fields(config)
    count = num_layers or fields.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    window = fields.get("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is not None:
        return tuple(_window_of_kind(kind, window) for kind in kinds[:count])
    if not window or not _uses_window(fields):
        return (None,) * count
    pattern = fields.get("sliding_window_pattern", "_sliding_window_pattern")
    if pattern is None and fields.get("model_type") == "gemma2":
        pattern = 2
    if pattern:
        return tuple(window if (layer + 1) % pattern else None for layer in range(count))
    first = fields.get("max_window_layers") or 0
    return tuple(window if layer >= first else None for layer in range(count))


def _window_of_kind(kind: str, window: int | None) -> int | None:
    if kind == "sliding_attention":
        return window or None
    if kind in _FULL_LAYERS:
        return None
    raise UnsupportedModelError("model", kind, f"layers of kind {kind} are not paged attention")


def _uses_window(fields: _Fields) -> bool:
    """Qwen-like configs name a window and switch it off, by default too."""
    switch = fields.get("use_sliding_window")
    return fields.get("max_window_layers") is None if switch is None else bool(switch)


def _num_kv_heads(fields: _Fields, num_heads: int) -> int:
    if fields.get("model_type") == "falcon" and not fields.get("new_decoder_architecture"):
        return 1 if fields.get("multi_query", default=True) else num_heads
    if fields.get("num_key_value_heads") is None and fields.get("multi_query"):
        return 1
    return fields.number("num_key_value_heads", "num_kv_heads", "n_head_kv", default=num_heads)


def _head_dim(fields: _Fields, num_heads: int) -> int:
    explicit = fields.get("head_dim", "attention_head_dim")
    if explicit is not None:
        return int(explicit)
    return fields.number("hidden_size", "n_embd", "d_model", "dim") // num_heads


class _Fields:
    """Reads a config that may be an object or a mapping, nested in `text_config` or not."""

    def __init__(self, config: object) -> None:
        self.outer = config
        self.inner = self._read(config, "text_config") or config

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is there and not None."""
        for source in (self.inner, self.outer):
            for name in names:
                value = self._read(source, name)
                if value is not None:
                    return value
        return default

    def number(self, *names: str, default: int | None = None) -> int:
        """Like `get`, for a count that must be there."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int):
            kind = self.get("model_type", default="model")
            fix = f"the config has no usable {names[0]} (found {value!r}), so no KV cache to page"
            raise UnsupportedModelError("model", kind, fix)
        return value

    @staticmethod
    def _read(source: object, name: str) -> Any:
        if isinstance(source, Mapping):
            return source.get(name)
        try:
            return getattr(source, name, None)
        except RuntimeError as error:
            # transformers' configs of models whose layers differ refuse to name one value.
            kind = getattr(source, "model_type", "model")
            fix = f"its layers differ in {name}, one pool cannot hold them"
            raise UnsupportedModelError("model", kind, fix) from error
