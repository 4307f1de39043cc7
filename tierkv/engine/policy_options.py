"""The policies that the options name."""

from __future__ import annotations

from typing import Any

from tierkv.cache.lower_tiers import TierSpec
from tierkv.config import EngineConfig, per_tier
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.preemption import SchedulingPolicies
from tierkv.errors import ConfigError
from tierkv.policies import registry
from tierkv.policies.admission import ByteRateLimit
from tierkv.types import TierName


def scheduling_policies(config: EngineConfig, cost: MeasuredCost) -> SchedulingPolicies:
    """What the options say about preempting, loading and prefetching."""
    prefetch = config.prefetch_policy
    return SchedulingPolicies(
        victim=make_policy("victim", "preemption_victim", config.preemption_victim),
        mode=make_policy("preemption", "preemption_mode", config.preemption_mode),
        load=make_policy("load", "load_policy", config.load_policy),
        cost=cost,
        prefetch_depth=0 if prefetch == "none" else 16,
        prefetches_swapped=prefetch == "lookahead",
        time_slice=config.time_slice if config.oversubscribe else None,
    )


def lower_specs(config: EngineConfig, capacities: dict[TierName, int]) -> list[TierSpec]:
    """The lower tiers, hot to cold, with the policies that the options name.

    Args:
        config: the options.
        capacities: slots of each tier.
    """
    eviction, admission = per_tier("eviction_policy", config), per_tier("admission_policy", config)
    rate = config.nvme_write_rate
    return [
        TierSpec(
            name,
            capacity,
            make_policy("eviction", "eviction_policy", eviction[name]),
            make_policy("admission", "admission_policy", admission[name]),
            ByteRateLimit(int(rate), int(rate)) if rate and name is TierName.NVME else None,
        )
        for name, capacity in capacities.items()
    ]


def make_policy(kind: str, option: str, spec: str) -> Any:
    """A policy by name.

    Raises:
        ConfigError: naming `option`.
    """
    try:
        return registry.create(kind, spec)
    except ValueError as error:
        raise ConfigError(option, spec, str(error)) from None
