"""Builds an engine around a model: load it, size the pool, check that both agree."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from tierkv.cache.block_port import TierPort
from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool, num_pool_blocks
from tierkv.config import EngineConfig, parse_sizes
from tierkv.engine.calibrate import measure_compute
from tierkv.engine.core import EngineCore, EngineInfo, LowerTierSetup, MonotonicClock
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
from tierkv.model.shard import WHOLE
from tierkv.protocols import BlockPort, Executor

if TYPE_CHECKING:
    from tierkv.engine.tp.group import TpGroup

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> EngineCore:
    """Load `config.model` and put an engine around it.

    Raises:
        ConfigError: an option that cannot be met, with the numbers.
        UnsupportedModelError: a model that cannot be served exactly.
    """
    parse_offload(config)  # a wrong option shows before the model is loaded
    if config.tensor_parallel_size == 1:
        return _assemble(config, None)
    from tierkv.engine.tp.group import TpGroup  # torch.distributed enters here

    group = TpGroup(config)
    try:
        with group.guarded():
            return _assemble(config, group)
    except BaseException:
        group.close(0.0)
        raise


def _assemble(config: EngineConfig, group: TpGroup | None) -> EngineCore:
    """The engine; with a group, every rank does at the same time what is done here."""
    loaded, num_blocks = _load(config, group)
    layout = loaded.layout(config.block_size)
    whole = _whole_layout(loaded, layout)
    window = layout.common_window
    is_overlapped = config.async_scheduling
    if is_overlapped is None:  # on a CPU there is nothing to overlap
        is_overlapped = loaded.device.type == "cuda" and group is None
    max_num_seqs = min(config.max_num_seqs, num_blocks)
    config = dataclasses.replace(config, max_num_seqs=max_num_seqs, async_scheduling=is_overlapped)
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
        layout=whole.fingerprint,
        block_bytes=whole.block_bytes,
    )
    pool = GpuPool(layout, num_blocks, loaded.device)
    logger.debug("attention kernels: %s", get_backend())  # compiled now, not in the first request
    _log_start(info, whole)
    runner = ModelRunner(loaded, pool)
    _prepare(config, runner, info.max_model_len)
    executor: Executor = runner
    tiers = _open_tiers(config, loaded, pool, group, whole)
    info.tiers = tiers.lines if tiers is not None else []
    port: BlockPort = TierPort(pool, *((tiers.arena, tiers.store) if tiers is not None else ()))
    if group is not None:
        from tierkv.engine.tp.executor import TpExecutor
        from tierkv.engine.tp.port import TpPort

        executor, port = TpExecutor(executor, group), TpPort(port, group, layout, whole)
    sampler, clock = TorchSampler(config.seed), MonotonicClock()
    try:
        compiler = grammars(config, info)
        return EngineCore(config, info, executor, sampler, clock, tiers, compiler, port, group)
    except BaseException:
        if tiers is not None:
            tiers.close()
        raise


def _load(config: EngineConfig, group: TpGroup | None) -> tuple[LoadedModel, int]:
    """The model, and how many blocks the pool of every rank has."""
    if group is not None:
        group.tell("load")
    loaded = load_model(config, group.shard if group is not None else WHOLE)
    num_blocks = pool_blocks(config, loaded)
    if group is not None:
        num_blocks = min(num_blocks, *group.replies())
        group.tell("pool", num_blocks)
    return loaded, num_blocks


def _whole_layout(loaded: LoadedModel, layout: KVLayout) -> KVLayout:
    """What a block of all ranks together looks like."""
    num_kv_heads = layout.num_kv_heads
    if not loaded.shard.is_whole:
        text = loaded.config.get_text_config(decoder=True)
        num_kv_heads = KVLayout.from_config(text, layout.block_size, layout.dtype).num_kv_heads
    return dataclasses.replace(layout, num_kv_heads=num_kv_heads, shard="0/1")


def _open_tiers(
    config: EngineConfig,
    loaded: LoadedModel,
    pool: GpuPool,
    group: TpGroup | None,
    whole: KVLayout,
) -> LowerTierSetup | None:
    """The tiers below the pool, if there are any; what all ranks have of them."""
    if config.offload is None:
        return None
    if group is not None:
        group.tell("calibrate")
    cost = measure_compute(loaded, pool.layout)
    open_own = partial(open_tiers, config, pool.layout, loaded.fingerprint, pool, cost)
    if group is None:
        return open_own()
    from tierkv.engine.tp.common import open_common

    return open_common(config, group, whole.block_bytes, open_own)


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


def pool_blocks(config: EngineConfig, loaded: LoadedModel) -> int:
    """How many blocks this rank's pool may have; ranks ask at the same time.

    Raises:
        ConfigError: not even one fits.
    """
    layout = loaded.layout(config.block_size)
    return num_pool_blocks(config, layout, loaded.device, _free_bytes(config, loaded, layout))


def _free_bytes(config: EngineConfig, loaded: LoadedModel, layout: KVLayout) -> int | None:
    """What a GPU has for KV, where nothing else says how large the pool is."""
    is_given = config.num_gpu_blocks is not None or config.kv_cache_memory is not None
    if is_given or loaded.device.type == "cpu":
        return None
    found = measure_memory(loaded, layout, config.max_num_batched_tokens, config.max_num_seqs)
    return found.room(config.gpu_memory_utilization, layout.block_bytes)


def _prepare(config: EngineConfig, runner: ModelRunner, max_model_len: int) -> None:
    """On a GPU with the whole model: compile kernels now, and let decode steps be graphs."""
    device = runner.loaded.device
    if device.type == "cpu" or not runner.loaded.shard.is_whole:
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
