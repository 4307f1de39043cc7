"""What a model's config says about its KV cache and its weights, without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierkv.cache.layout import DTYPE_BITS, KVLayout, layer_windows
from tierkv.cli.shapes import built_in, unknown_model
from tierkv.errors import ConfigError

DEMO = Path(__file__).parent.parent / "model" / "demo"


@dataclass(slots=True, frozen=True)
class ModelFacts:
    """Shape and size of a model.

    Attributes:
        attention: `MHA`, `GQA` or `MQA`.
        kv_dtype: element type of KV unless chosen otherwise: the model's own.
        weights_bytes: bytes of all parameters; `weights_source` says how they were counted.
        windows: per layer, its sliding window in tokens or None.
    """

    name: str
    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    attention: str
    kv_dtype: str
    weights_bytes: int
    weights_source: str
    windows: tuple[int | None, ...]

    def layout(self, dtype: str, block_size: int) -> KVLayout:
        """The block layout with KV elements of `dtype`."""
        return KVLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            dtype=dtype,
            windows=self.windows,
        )


def read_facts(name: str) -> ModelFacts:
    """Facts of a model directory, a config file, a cached hub model or a well-known name.

    Raises:
        ConfigError: the name is none of these, or the config describes no KV cache.
    """
    path = find_config(name)
    if path is None:
        shape = built_in(name)
        if shape is None:
            raise unknown_model(name)
        num_parameters = int(shape["num_parameters"])
        size = num_parameters * DTYPE_BITS[weight_dtype(shape)] // 8
        source = f"{num_parameters:,} parameters in {weight_dtype(shape)}"
        return facts_of(name, shape, size, source)
    config = read_json(path)
    KVLayout.from_config(config, block_size=16, dtype=weight_dtype(config))  # refuse early
    size, source = weights_of(path, config)
    return facts_of(name, config, size, source)


def find_config(name: str) -> Path | None:
    """The `config.json` that `name` stands for, or None."""
    path = DEMO if name == "demo" else Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError("model", name, "the directory has no config.json")
        return path / "config.json"
    return cached_config(name)


def cached_config(name: str) -> Path | None:
    """The config of a hub model that was downloaded before; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A config file's content."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("model", str(path), f"is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError("model", str(path), "is not a model config")
    return config


def weights_of(config_path: Path, config: dict[str, Any]) -> tuple[int, str]:
    """Bytes of the weights: as stored beside the config, or counted from the architecture."""
    files = sorted(config_path.parent.glob("*.safetensors"))
    if files:
        size = sum(tensor_bytes(path) for path in files)
        return size, f"as stored in {len(files)} safetensors file{'s' * (len(files) > 1)}"
    count = count_parameters(config_path)
    dtype = weight_dtype(config)
    return count * DTYPE_BITS[dtype] // 8, f"{count:,} parameters in {dtype}"


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: what follows its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def count_parameters(config_path: Path) -> int:
    """Parameters of the architecture; the model is built without memory for them.

    Raises:
        ConfigError: transformers cannot build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(str(config_path))
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each architecture has its own complaints
        fix = f"transformers cannot build this model: {error}"
        raise ConfigError("model", str(config_path), fix) from error
    return sum(parameter.numel() for parameter in model.parameters())


def weight_dtype(config: dict[str, Any]) -> str:
    """The element type that the config names, float32 when it names none that we know."""
    inner = config.get("text_config") or config
    named = inner.get("dtype") or inner.get("torch_dtype") or config.get("torch_dtype")
    return named if named in DTYPE_BITS else "float32"


def facts_of(name: str, config: dict[str, Any], size: int, source: str) -> ModelFacts:
    """Facts from a config and the weights' size."""
    dtype = weight_dtype(config)
    layout = KVLayout.from_config(config, block_size=16, dtype=dtype)
    inner = config.get("text_config") or config
    heads = first_of(inner, "num_attention_heads", "n_head", "n_heads", "num_heads")
    context = first_of(inner, "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    return ModelFacts(
        name=name,
        model_type=inner.get("model_type", "unknown architecture"),
        num_layers=layout.num_layers,
        num_heads=heads or layout.num_kv_heads,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        context=context or 2048,
        attention=attention_kind(heads or layout.num_kv_heads, layout.num_kv_heads),
        kv_dtype=dtype,
        weights_bytes=size,
        weights_source=source,
        windows=layer_windows(config, layout.num_layers),
    )


def first_of(config: dict[str, Any], *names: str) -> int | None:
    """The first of the fields that the config has."""
    return next((int(config[name]) for name in names if config.get(name)), None)


def attention_kind(num_heads: int, num_kv_heads: int) -> str:
    """`MHA`: a KV head per head; `MQA`: one for all; `GQA`: one per group."""
    if num_kv_heads == num_heads:
        return "MHA"
    return "MQA" if num_kv_heads == 1 else "GQA"
