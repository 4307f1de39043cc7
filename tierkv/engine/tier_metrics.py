"""What the tiers and the links between them have done, as plain numbers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from tierkv.cache.evictor import GPU
from tierkv.cache.moves import LinkStats, Moves
from tierkv.cache.tiered_cache import TieredCache
from tierkv.types import MoveFailure, TierName


def tier_metrics(cache: TieredCache, policies: Mapping[TierName, str]) -> dict[str, Any]:
    """Gauges and counters of all tiers and links, by the names of docs/metrics.md.

    Args:
        cache: whose.
        policies: the eviction policy of each tier, as the options name it.
    """
    found = {
        "gpu_blocks_cached": cache.evictors[GPU].num_evictable,
        "gpu_blocks_used": cache.num_blocks - cache.num_available,
    }
    for tier in cache.residency.tiers:
        found |= _slots(cache, tier, policies[tier])
    if cache.moves is None or cache.lower is None:
        return found
    for tier in cache.residency.tiers:
        found |= _bytes(cache, tier, cache.moves.slot_bytes)
    return found | {
        **_links(cache.moves, list(cache.residency.tiers)),
        **_store(cache.moves),
        **_prefetches(cache),
        "offers_waiting": cache.lower.num_queued,
        "blocks_lost": cache.moves.num_lost,
        "loads_joined": cache.loads.num_joined,
        "resumed_tails": cache.loads.num_tails,
    }


def _slots(cache: TieredCache, tier: TierName, policy: str) -> dict[str, Any]:
    name, slots, evicted = tier.value, cache.residency.tiers[tier], cache.evictors[tier].num_evicted
    return {
        f"{name}_blocks": slots.capacity,
        f"{name}_blocks_free": slots.num_empty,
        f"{name}_blocks_evicted": evicted,
        f"{name}_blocks_evicted_{_word(policy)}": evicted,
    }


def _word(policy: str) -> str:
    """A policy's name without its parameters, as a part of a metric's name."""
    return re.sub(r"\W", "_", policy.partition(":")[0].strip())


def _bytes(cache: TieredCache, tier: TierName, slot_bytes: int) -> dict[str, Any]:
    name, slots = tier.value, cache.residency.tiers[tier]
    used = slots.capacity - slots.num_empty
    return {
        f"{name}_capacity_bytes": slots.capacity * slot_bytes,
        f"{name}_used_bytes": used * slot_bytes,
        f"{name}_pinned_bytes": (used - cache.evictors[tier].num_evictable) * slot_bytes,
    }


def _links(moves: Moves, tiers: list[TierName]) -> dict[str, Any]:
    found: dict[str, Any] = {"moves_in_flight": len(moves.tickets)}
    failures = dict.fromkeys(MoveFailure, 0)
    for ends in itertools.permutations(tiers, 2):
        link, stats = f"{ends[0].value}_{ends[1].value}", moves.stats.get(ends, LinkStats())
        found[f"moves_{link}"] = stats.num_moves
        found[f"moved_bytes_{link}"] = stats.num_bytes
        found[f"move_seconds_{link}"] = stats.seconds
        found[f"moves_in_flight_{link}"] = moves.in_flight_bytes[ends] // moves.slot_bytes
        for cause, count in stats.failures.items():
            failures[cause] += count
    return found | {f"move_failures_{cause.value}": count for cause, count in failures.items()}


def _store(moves: Moves) -> dict[str, Any]:
    """Of the persistent tier, if there is one."""
    if moves.erasures is None:
        return {}
    return {
        "nvme_quarantined_reads": int(moves.is_quarantined(is_read=True)),
        "nvme_quarantined_writes": int(moves.is_quarantined(is_read=False)),
        "erase_failures": moves.erasures.num_failures,
        "erasures_open": moves.erasures.num_open,
    }


def _prefetches(cache: TieredCache) -> dict[str, Any]:
    return {
        "prefetch_issued": cache.loads.num_prefetched,
        "prefetch_useful": cache.pool.num_prefetched_used,
        "prefetch_late": cache.loads.num_prefetched_late,
        "prefetch_wasted": cache.loads.num_prefetched_lost + cache.evictors[GPU].num_unused,
    }
