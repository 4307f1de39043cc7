"""What the tiers of all ranks have in common.

A tier has as many slots as on the rank that has fewest, and none where a rank has no such tier. A
stored block counts if every rank has its key in the same slot: a key says which tokens and which
model, so the parts fit together whenever each was written. The others are erased.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tierkv.config import EngineConfig
from tierkv.engine.core import LowerTierSetup
from tierkv.engine.tp.group import TpGroup
from tierkv.engine.tp.mover import TpMover
from tierkv.errors import ConfigError
from tierkv.storage.base import Failure
from tierkv.types import TierName

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankTiers:
    """One rank's lower tiers: slots of each, and slot and key of every stored block."""

    capacities: dict[TierName, int]
    stored: list[tuple[int, bytes]]


def describe(tiers: LowerTierSetup | None) -> RankTiers:
    """What a rank opened."""
    if tiers is None:
        return RankTiers({}, [])
    capacities = {spec.name: spec.capacity for spec in tiers.specs}
    return RankTiers(capacities, [(block.slot, block.key) for block in tiers.stored])


def common_tiers(all_ranks: Sequence[RankTiers]) -> RankTiers:
    """What every rank has."""
    first, *others = all_ranks
    capacities = {
        name: min(rank.capacities[name] for rank in all_ranks)
        for name in first.capacities
        if all(name in rank.capacities for rank in others)
    }
    stored = set(first.stored).intersection(*(rank.stored for rank in others))
    return RankTiers(capacities, sorted(stored) if TierName.NVME in capacities else [])


def erase_stored(tiers: LowerTierSetup | None, slots: list[int]) -> None:
    """Erase stored blocks before anything moves; one that cannot be is another miss next time."""
    if tiers is None or tiers.store is None or not slots:
        return
    failures = [o for o in tiers.store.erase(slots) if isinstance(o, Failure)]
    if failures:
        cause = failures[0].cause.value
        logger.warning("%d stored blocks could not be erased (%s)", len(failures), cause)


def open_common(
    config: EngineConfig,
    group: TpGroup,
    block_bytes: int,
    open_own: Callable[[], LowerTierSetup | None],
) -> LowerTierSetup | None:
    """Open the tiers of all ranks; None when there is none that every rank has.

    Args:
        config: the options.
        group: the other ranks.
        block_bytes: of a whole block, which is what limits, costs and metrics count.
        open_own: opens rank 0's.

    Raises:
        ConfigError: a rank could not open one that was asked for by name, or that it needs.
    """
    group.tell("open_tiers")
    tiers = open_own()
    try:
        common = _join(tiers, group, block_bytes)
        if common is None and config.oversubscribe:
            fix = "needs a tier to swap to, and there is none that all ranks have"
            raise ConfigError("oversubscribe", True, fix)
    except BaseException:
        if tiers is not None:
            tiers.close()
        raise
    if common is None and tiers is not None:
        tiers.close()
    return common


def _join(tiers: LowerTierSetup | None, group: TpGroup, block_bytes: int) -> LowerTierSetup | None:
    """Erase what is not common, and put the rest together."""
    all_ranks = [describe(tiers), *group.replies()]
    common = common_tiers(all_ranks)
    kept = set(common.stored)
    extra = [[slot for slot, key in rank.stored if (slot, key) not in kept] for rank in all_ranks]
    erase_stored(tiers, extra[0])
    for worker, slots in zip(group.workers, extra[1:], strict=True):
        worker.send("forget_stored", slots)
    if num := sum(map(len, extra)):
        logger.warning("%d stored blocks are erased: not every rank has them", num)
    if tiers is None or not common.capacities:
        return None
    tiers.cost.block_bytes = block_bytes
    return dataclasses.replace(_joined(tiers, group, common), slot_bytes=block_bytes)


def _joined(tiers: LowerTierSetup, group: TpGroup, common: RankTiers) -> LowerTierSetup:
    kept = set(common.stored)
    mover = TpMover([tiers.mover, *(worker.mover for worker in group.workers)])

    owner = os.getpid()

    def close() -> None:
        if os.getpid() != owner:
            return  # a fork that ends must not close what its parent goes on using
        for worker in group.workers:
            worker.mover.close()
        tiers.close()

    return dataclasses.replace(
        tiers,
        specs=[
            dataclasses.replace(spec, capacity=common.capacities[spec.name])
            for spec in tiers.specs
            if spec.name in common.capacities
        ],
        mover=mover,
        stored=[block for block in tiers.stored if (block.slot, block.key) in kept],
        close=close,
        lines=[f"{line} (rank 0 of {group.size})" for line in tiers.lines],
    )
