"""Opening the tiers below the pool: sizes, directories, policies, the mover between them."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tierkv.cache.layout import KVLayout
from tierkv.cache.link_mover import LinkMover
from tierkv.cache.lower_tiers import MoveLimits
from tierkv.cache.mover import ThreadMover
from tierkv.cache.pools import GpuPool, available_memory
from tierkv.config import EngineConfig, parse_bytes
from tierkv.engine.core import LowerTierSetup
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.policy_options import lower_specs
from tierkv.errors import ConfigError
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore
from tierkv.storage.directory import disk_bytes
from tierkv.storage.io import OpenIo
from tierkv.storage.io_kvikio import KvikioIo, load_kvikio
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.nvme_store import NvmeStore
from tierkv.storage.quarantine import QuarantinedStore
from tierkv.storage.root import list_stores, open_store
from tierkv.types import TierName

logger = logging.getLogger(__name__)

CPU, NVME = TierName.CPU, TierName.NVME
_Tier = TypeVar("_Tier", HostArena, NvmeStore)
AUTO = "auto"
_CPU_SHARE = 0.25
_NVME_SHARE, _ALL_NVME_SHARE = 0.1, 0.5  # of one model's store, and of all
_NVME_DEFAULT_BYTES = 20 << 30
_CLOSE_S = 5.0  # for the store, once no move is left


@dataclass(slots=True)
class TierRequest:
    """One lower tier as asked for: bytes (None: choose), and where it is kept."""

    num_bytes: int | None = None
    path: Path | None = None


def parse_offload(config: EngineConfig) -> dict[TierName, TierRequest]:
    """The tiers that `offload` names, hot to cold: `cpu,nvme`, `cpu=16GiB,nvme=200GiB:/path`.

    Raises:
        ConfigError: an unknown tier, one named twice, or a size that is none.
    """
    found: dict[TierName, TierRequest] = {}
    if config.offload == AUTO:
        both = {CPU: TierRequest(), NVME: TierRequest()}
        return both if config.enable_prefix_caching else {}
    names = {CPU.value: CPU, NVME.value: NVME}
    for part in filter(None, (p.strip() for p in (config.offload or "").split(","))):
        name, _, rest = part.partition("=")
        tier = names.get(name.strip())
        if tier is None or tier in found:
            fix = "name each of cpu and nvme at most once, e.g. cpu,nvme or cpu=16GiB,nvme=200GiB"
            raise ConfigError("offload", config.offload, fix)
        size, _, path = rest.partition(":")
        if path and tier is CPU:
            raise ConfigError("offload", config.offload, "only nvme has a path")
        request = TierRequest(parse_bytes(size, "offload") if size else None)
        request.path = Path(path) if path else None
        found[tier] = request
    if config.offload is not None and not found:
        raise ConfigError("offload", config.offload, "name at least one of cpu and nvme")
    return {tier: found[tier] for tier in (CPU, NVME) if tier in found}


def default_path() -> Path:
    """Where blocks persist unless told otherwise: `TIERKV_KV_DIR`, or the user's cache (XDG)."""
    if given := os.environ.get("TIERKV_KV_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tierkv" / "kv"


def store_path(config: EngineConfig, request: TierRequest) -> Path:
    """Where the blocks of this engine persist.

    Raises:
        ConfigError: it is in a home directory, and there is none.
    """
    path = request.path or Path(config.nvme_path or default_path())
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError("nvme_path", str(path), f"cannot be used ({error}); name one") from None


def open_tiers(
    config: EngineConfig, layout: KVLayout, fingerprint: bytes, pool: GpuPool, cost: MeasuredCost
) -> LowerTierSetup | None:
    """Allocate and open what the options ask for; None when there is one tier only.

    Args:
        config: the options.
        layout: of the pool.
        fingerprint: of the model.
        pool: the mover copies from and to it.
        cost: for the load-or-compute decision.

    Raises:
        ConfigError: no room for one block, a path that cannot be used or that another process has;
            with `auto` such a tier is left out, unless `oversubscribe` needs one.
    """
    requests = parse_offload(config)
    arena: HostArena | None = None
    store: NvmeStore | None = None
    if CPU in requests:
        arena = _attempt(config, lambda: _open_arena(config, requests[CPU], layout))
    if NVME in requests:
        arguments = requests[NVME], layout, fingerprint, io_engine(config)
        store = _attempt(config, lambda: _open_store(config, *arguments))
    if arena is None and store is None:
        if config.oversubscribe:
            raise ConfigError("oversubscribe", True, "needs a tier to swap to, and there is none")
        return None
    try:
        return _setup(config, layout, pool, cost, arena, store)
    except BaseException:
        if store is not None:
            store.close()
        raise


def _setup(
    config: EngineConfig,
    layout: KVLayout,
    pool: GpuPool,
    cost: MeasuredCost,
    arena: HostArena | None,
    store: NvmeStore | None,
) -> LowerTierSetup:
    """The mover between what was opened, and the tiers' policies."""
    capacities: dict[TierName, int] = {}
    if arena is not None:
        capacities[CPU] = arena.num_slots
    if store is not None:
        capacities[NVME] = store.capacity
    specs = lower_specs(config, capacities)
    guarded = QuarantinedStore(store, time.monotonic) if store is not None else None
    mover = make_mover(pool, arena, guarded)
    return LowerTierSetup(
        specs=specs,
        mover=mover,
        slot_bytes=layout.block_bytes,
        limits=MoveLimits(load_timeout_s=config.load_timeout),
        cost=cost,
        stored=store.recover() if store is not None else [],
        close=_closer(mover, guarded),
        lines=_describe(layout, arena, store),
        arena=arena,
        store=guarded,
    )


def make_mover(pool: GpuPool, arena: HostArena | None, store: BlockStore | None) -> LinkMover:
    """The mover for where the pool is."""
    if pool.device.type == "cpu":
        return ThreadMover(pool, arena, store)
    from tierkv.cache.cuda.mover import CudaMover

    return CudaMover(pool, arena, store)


def _closer(mover: LinkMover, store: BlockStore | None) -> Callable[[], None]:
    owner = os.getpid()

    def close() -> None:
        if os.getpid() != owner:
            return  # a fork that ends must not seal what its parent goes on writing
        mover.close()
        if store is not None:
            thread = threading.Thread(target=_let_go, args=(store,), daemon=True)
            thread.start()
            thread.join(_CLOSE_S)
            if thread.is_alive():
                logger.warning("the store does not answer and is left behind; its next start scans")

    return close


def _let_go(store: BlockStore) -> None:
    """Close; on a thread of its own, because a disk that is stuck may never answer."""
    store.flush()
    store.close()


def _attempt(config: EngineConfig, open_tier: Callable[[], _Tier]) -> _Tier | None:
    """The tier; None, with a warning, if it cannot be had and was not asked for by name."""
    try:
        return open_tier()
    except ConfigError as error:
        if config.offload != AUTO:
            raise
        logger.warning("a tier is left out: %s", error)
        return None


def _open_arena(config: EngineConfig, request: TierRequest, layout: KVLayout) -> HostArena:
    asked = request.num_bytes or config.cpu_cache_size
    size = int(asked) if asked else int(available_memory() * _CPU_SHARE)
    size //= layout.num_shards  # the ranks share it
    num_slots = size // layout.slot_bytes
    if num_slots < 1:
        fix = f"{size} bytes hold no block of {layout.slot_bytes}; give more"
        raise ConfigError("cpu_cache_size", asked, fix)
    return HostArena(num_slots, layout.block_bytes)


def _open_store(
    config: EngineConfig,
    request: TierRequest,
    layout: KVLayout,
    fingerprint: bytes,
    open_io: OpenIo,
) -> NvmeStore:
    path = store_path(config, request)
    asked = request.num_bytes or config.nvme_cache_size
    names = [f"{fingerprint.hex()}-{part.fingerprint}" for part in layout.shards]
    name, count = names.pop(layout.rank), layout.num_shards
    if asked:
        own = None if count == 1 else int(asked) // count
        return open_store(path, name, layout.slot_bytes, int(asked), own, open_io, partners=names)
    room = _disk_room(path)
    own = min(_NVME_DEFAULT_BYTES, int(room * _NVME_SHARE)) // count
    most = int(room * _ALL_NVME_SHARE)
    return open_store(path, name, layout.slot_bytes, most, own, open_io, partners=names)


def io_engine(config: EngineConfig) -> OpenIo:
    """What `nvme_io` names.

    Raises:
        ConfigError: it is not there.
    """
    if config.nvme_io == "posix":
        return PosixIo
    load_kvikio()
    return KvikioIo


def _describe(layout: KVLayout, arena: HostArena | None, store: NvmeStore | None) -> list[str]:
    """A line for each tier, for whoever starts the engine."""
    lines = []
    if arena is not None:
        lines.append(f"cpu: {arena.num_slots:,} blocks, {arena.num_bytes / 2**30:.2f} GiB")
    if store is not None:
        size = store.capacity * layout.slot_bytes / 2**30
        lines.append(
            f"nvme: {store.capacity:,} blocks, {size:.2f} GiB in {store.path}, where the KV of "
            "prompts persists (`tierkv store clear` removes it)"
        )
    for line in lines:
        logger.info(line)
    return lines


def _disk_room(path: Path) -> int:
    """Bytes of the disk that are free or that stores below `path` have: what an earlier start has
    taken must not make the next one smaller.

    Raises:
        ConfigError: the path cannot be looked at.
    """
    existing = path
    try:
        while not existing.exists():
            existing = existing.parent
        taken = sum(disk_bytes(store.path) for store in list_stores(path)) if path.is_dir() else 0
        return shutil.disk_usage(existing).free + taken
    except OSError as error:
        fix = f"cannot be used ({error.strerror}); choose another one"
        raise ConfigError("nvme_path", str(path), fix) from None
