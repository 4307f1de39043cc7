"""Finds a model, refuses what cannot be served exactly, and loads it with tierkv's attention."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tierkv.config import EngineConfig
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.kernels import ops
from tierkv.kernels.linear import pack_linears
from tierkv.model import attention, facts, rope, trace
from tierkv.model.device import choose_device, free_memory, gib
from tierkv.model.fingerprint import model_fingerprint
from tierkv.model.fuse import fuse_projections
from tierkv.model.loaded import LoadedModel, dtype_name
from tierkv.model.probe import verify_model
from tierkv.model.quantize import check_quantization, quantize
from tierkv.model.shard import WHOLE, Shard, check_shardable, rank_in_environment, sharded
from tierkv.model.swap import swap_modules, swap_rotary

logger = logging.getLogger(__name__)

DEMO = Path(__file__).parent / "demo"
"""Directory of the built-in model `demo`."""


def load_model(config: EngineConfig, shard: Shard = WHOLE) -> LoadedModel:
    """Load `config.model`, or this rank's part of it; then all ranks must do so at the same time.

    Raises:
        ConfigError: the model cannot be found or read, or the device is not there.
        UnsupportedModelError: its architecture cannot be served exactly, with the reason.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    source = str(DEMO) if config.model == "demo" else config.model
    device = choose_device(config.device)
    if device.type != "cpu":
        gc.collect()  # an engine that was closed is a cycle, which keeps the device full
    check_quantization(config.quantization, device)
    hf_config = load_config(config, source)
    check_shardable(hf_config, shard)
    dtype = _dtype(config, hf_config, device)
    with rank_in_environment(shard):
        model = _on(device, _build(config, source, hf_config, dtype, shard, device))
    max_model_len = rope.fix_length(model, hf_config, config.max_model_len)
    variant = f"{dtype_name(dtype)}, {max_model_len} positions"
    if config.quantization is not None:
        variant += f", {config.quantization}"
    fingerprint = model_fingerprint(model, hf_config, variant)
    layers = trace.trace_layers(model)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    directory = Path(source) if Path(source).is_dir() else None
    loaded = LoadedModel(
        model=model,
        config=hf_config,
        tokenizer_path=config.tokenizer or source,
        device=device,
        dtype=dtype,
        layers=layers,
        max_model_len=max_model_len,
        eos_token_ids=facts.eos_token_ids(hf_config, directory, model.generation_config),
        vocab_size=_vocab_size(model),
        fingerprint=fingerprint,
        shard=shard,
    )
    if config.verify_model:
        verify_model(loaded)
    _speed_up(loaded)
    if config.quantization is not None:
        quantize(loaded.model, config.quantization)
    return loaded


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    """The model on the device, set to inference.

    Raises:
        ConfigError: it does not fit, with the numbers.
    """
    try:
        placed: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        size = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
        fix = f"its weights take {gib(size)}, {free_memory(device)}: use a smaller model or dtype"
        raise ConfigError("model", type(model).__name__, fix) from error
    return placed


def _speed_up(loaded: LoadedModel) -> None:
    """Fuse half-precision weights and what lies between them; the probe needs them plain. What is
    fp32 stays as it is, so that its tokens are transformers'."""
    model, dtype, device = loaded.model, loaded.dtype, loaded.device
    if dtype is torch.float32:
        return
    num_fused = fuse_projections(model)
    num_packed = pack_linears(model) if device.type == "cpu" else 0
    has_kernels = device.type == "cuda" or (
        dtype is torch.bfloat16 and ops.get_backend() == "native"
    )
    num_swapped = 0
    if has_kernels:
        num_swapped = swap_modules(model, dtype) + swap_rotary(model, dtype, device)
    logger.debug("%d fused, %d packed, %d swapped", num_fused, num_packed, num_swapped)


def load_config(config: EngineConfig, source: str) -> Any:
    """The model's Hugging Face config, checked for support.

    Raises:
        ConfigError: there is no such model.
        UnsupportedModelError: it cannot be served, with the reason.
    """
    try:
        hf_config = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # configs check themselves, each in its own way
        raise _unreadable(config, source, error) from error
    facts.check_config(hf_config)
    if not _has_own_code(hf_config):
        facts.check_class(hf_config, _model_class(hf_config))
    return hf_config


def _unreadable(config: EngineConfig, source: str, error: Exception) -> ConfigError:
    """The right error for a config that could not be read."""
    first_line = _first_line(error)
    if Path(source).is_dir():
        if (Path(source) / "config.json").is_file():
            return UnsupportedModelError("model", config.model, first_line)
        return ConfigError("model", config.model, "the directory has no config.json")
    fix = f"neither `demo`, a model directory, nor a hub id that can be reached ({first_line})"
    return ConfigError("model", config.model, fix)


def _first_line(error: Exception) -> str:
    """The error in one line; of a long story the first two, where the second has the reason."""
    lines = str(error).strip().splitlines() or [repr(error)]
    has_more = lines[0].endswith(":") and len(lines) > 1
    return f"{lines[0]} {lines[1].strip()}" if has_more else lines[0]


def _has_own_code(hf_config: Any) -> bool:
    """The repository ships the model's code, which transformers' tables do not list."""
    return "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})


def _model_class(hf_config: Any) -> type[Any] | None:
    """The class AutoModelForCausalLM would build, or None."""
    mapping = AutoModelForCausalLM._model_mapping
    found: Any = mapping.get(type(hf_config), None)
    classes: list[type[Any]] = list(found) if isinstance(found, (tuple, list)) else [found]
    return classes[0]


def _dtype(config: EngineConfig, hf_config: Any, device: torch.device) -> torch.dtype:
    """The dtype asked for; `auto` is the config's, except where another is far faster: instead of
    float16 on CPUs, and of float32 on GPUs."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    named = getattr(hf_config, "dtype", None) or facts.text_config(hf_config).dtype
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named or "float32"))
    if device.type == "cpu" and dtype is torch.float16:
        fast_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = torch.bfloat16 if fast_bf16 else torch.float32
        logger.warning("float16 is slow on CPUs: the model runs in %s", dtype_name(dtype))
    if device.type == "cuda" and dtype is torch.float32:
        dtype = torch.bfloat16
        logger.info("the model runs in bfloat16; dtype=float32 would keep its own")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError("dtype", config.dtype, f"the model's {dtype} is not served; choose one")
    return dtype


def _build(
    config: EngineConfig,
    source: str,
    hf_config: Any,
    dtype: torch.dtype,
    shard: Shard,
    device: torch.device,
) -> PreTrainedModel:
    """The module with its weights: read, or random from the seed."""
    common: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": trace.IMPLEMENTATION,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        if config.load_format == "dummy":
            return _dummy(config, hf_config, common, shard, device)
        model: PreTrainedModel
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=hf_config,
            revision=config.revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # said below, with the names
            **sharded(shard),
            **common,
        )
    except (OSError, SafetensorError) as error:
        fix = f"its weights cannot be read ({_first_line(error)})"
        raise ConfigError("model", config.model, fix) from error
    except Exception as error:  # a shape, an activation, a quantisation: each fails in its own way
        fix = f"transformers cannot build it ({type(error).__name__}: {_first_line(error)})"
        raise ConfigError("model", config.model, fix) from error
    _check_weights(config, info)
    return model


def _dummy(
    config: EngineConfig, hf_config: Any, common: dict[str, Any], shard: Shard, device: torch.device
) -> PreTrainedModel:
    """Random weights from the seed, made on the device: on a CPU billions of them take minutes. A
    rank makes all, on the CPU, and keeps its part."""
    place = device if shard.is_whole else torch.device("cpu")
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(config.seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, **common)
    if shard.is_whole:
        return model
    part: PreTrainedModel = type(model).from_pretrained(
        None, config=hf_config, state_dict=model.state_dict(), **sharded(shard), **common
    )
    return part


def _check_weights(config: EngineConfig, info: dict[str, Any]) -> None:
    """Refuse a model some of whose weights were made up; say which of its files' go unused."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        fix = f"its files lack {len(missing)} weights ({', '.join(missing[:3])}, ...)"
        raise ConfigError("model", config.model, fix)
    if mismatched:
        name, found, wanted = mismatched[0]
        fix = (
            f"{len(mismatched)} of its weights are not of the shape that config.json implies "
            f"({name} is {list(found)}, not {list(wanted)})"
        )
        raise ConfigError("model", config.model, fix)
    if unused := sorted(info["unexpected_keys"]):
        names = ", ".join(unused[:3])
        logger.warning("%d weights in its files have no place (%s, ...)", len(unused), names)


def _vocab_size(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    if head is not None:
        return int(head.weight.shape[0])
    return int(facts.text_config(model.config).vocab_size)
