"""Builds an engine around a model: load it, size the pool, check that both agree."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from tierkv.cache.block_port import TierPort
from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool, num_pool_blocks
from tierkv.config import EngineConfig, parse_sizes
from tierkv.engine.calibrate import measure_compute
from tierkv.engine.core import EngineCore, EngineInfo, MonotonicClock
from tierkv.engine.grammar import GrammarCompiler, make_vocabulary
from tierkv.engine.sampler import TorchSampler
from tierkv.engine.tiers import open_tiers, parse_offload
from tierkv.engine.tokenizer import load_tokenizer
from tierkv.errors import ConfigError
from tierkv.kernels.ops import get_backend
from tierkv.model.graphs import CudaBackend, batch_sizes
from tierkv.model.loaded import LoadedModel, dtype_name
from tierkv.model.loader import load_model
from tierkv.model.memory import measure_memory
from tierkv.model.runner import ModelRunner

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> EngineCore:
    """Load `config.model` and put an engine around it.

    Raises:
        ConfigError: an option that cannot be met, with the numbers.
        UnsupportedModelError: a model that cannot be served exactly.
    """
    parse_offload(config)  # a wrong option shows before the model is loaded
    loaded = load_model(config)
    layout = loaded.layout(config.block_size)
    num_blocks = num_pool_blocks(config, layout, loaded.device, _free_bytes(config, loaded, layout))
    window = layout.common_window
    config = dataclasses.replace(config, max_num_seqs=min(config.max_num_seqs, num_blocks))
    info = EngineInfo(
        model=config.model,
        tokenizer=loaded.tokenizer_path,
        max_model_len=_max_model_len(config, loaded, num_blocks, window),
        vocab_size=loaded.vocab_size,
        eos_token_ids=sorted(loaded.eos_token_ids),
        num_gpu_blocks=num_blocks,
        block_size=config.block_size,
        dtype=dtype_name(loaded.dtype),
        device=loaded.device.type,
        fingerprint=loaded.fingerprint,
        window=window,
        layout=layout.fingerprint,
        block_bytes=layout.block_bytes,
    )
    pool = GpuPool(layout, num_blocks, loaded.device)
    logger.debug("attention kernels: %s", get_backend())  # compiled now, not in the first request
    _log_start(info, layout)
    runner = ModelRunner(loaded, pool)
    _prepare(config, runner, info.max_model_len)
    tiers = None
    if config.offload is not None:
        cost = measure_compute(loaded, layout)
        tiers = open_tiers(config, layout, loaded.fingerprint, pool, cost)
        info.tiers = tiers.lines if tiers is not None else []
    port = TierPort(pool, *((tiers.arena, tiers.store) if tiers is not None else ()))
    sampler, clock = TorchSampler(config.seed), MonotonicClock()
    try:
        compiler = grammars(config, info)
        return EngineCore(config, info, runner, sampler, clock, tiers, compiler, port)
    except BaseException:
        if tiers is not None:
            tiers.close()
        raise


def grammars(config: EngineConfig, info: EngineInfo) -> GrammarCompiler:
    """A compiler that loads the model's tokenizer when it is first needed."""

    def vocabulary() -> Any:
        tokenizer = load_tokenizer(
            info.tokenizer, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        return make_vocabulary(tokenizer, info.vocab_size, info.eos_token_ids)

    return GrammarCompiler(vocabulary)


def _max_model_len(
    config: EngineConfig, loaded: LoadedModel, num_blocks: int, window: int | None
) -> int:
    """What was asked for, or the model's own limit as far as the pool allows."""
    if config.max_model_len is None:
        room = num_blocks * config.block_size + 1  # the last token needs no KV
        return loaded.max_model_len if window is not None else min(loaded.max_model_len, room)
    if config.max_model_len > loaded.max_model_len:
        fix = f"the model's positions end at {loaded.max_model_len}; ask for at most that"
        raise ConfigError("max_model_len", config.max_model_len, fix)
    return config.max_model_len


def _free_bytes(config: EngineConfig, loaded: LoadedModel, layout: KVLayout) -> int | None:
    """What a GPU has for KV, where nothing else says how large the pool is."""
    is_given = config.num_gpu_blocks is not None or config.kv_cache_memory is not None
    if is_given or loaded.device.type == "cpu":
        return None
    found = measure_memory(loaded, layout, config.max_num_batched_tokens, config.max_num_seqs)
    return found.room(config.gpu_memory_utilization, layout.block_bytes)


def _prepare(config: EngineConfig, runner: ModelRunner, max_model_len: int) -> None:
    """On a GPU: compile the kernels now, and let decode steps be graphs."""
    device = runner.loaded.device
    if device.type == "cpu":
        return
    runner.warm_up()
    if config.enforce_eager:
        return
    asked = config.cuda_graph_sizes
    sizes = batch_sizes(
        config.max_num_seqs, () if asked is None else parse_sizes(asked, "cuda_graph_sizes")
    )
    runner.capture(sizes, max_model_len, CudaBackend(device))


def _log_start(info: EngineInfo, layout: KVLayout) -> None:
    tokens = info.num_gpu_blocks * info.block_size
    size = info.num_gpu_blocks * layout.block_bytes / 2**30
    logger.info(
        "%s in %s on %s: %d KV blocks of %d tokens (%.2f GiB, %d tokens), max_model_len %d",
        info.model,
        info.dtype,
        info.device,
        info.num_gpu_blocks,
        info.block_size,
        size,
        tokens,
        info.max_model_len,
    )
