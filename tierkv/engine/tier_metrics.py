"""What the tiers and the links between them have done, as plain numbers."""

from __future__ import annotations

from typing import Any

from tierkv.cache.evictor import GPU
from tierkv.cache.tiered_cache import TieredCache


def tier_metrics(cache: TieredCache) -> dict[str, Any]:
    """Gauges of the lower tiers, and counters of each link; empty with one tier.

    For tier T: `T_blocks`, `T_blocks_free`, `T_blocks_evicted`; for source S and destination D:
    `moves_S_D`, `moved_bytes_S_D`, `move_seconds_S_D`, and `move_failures_CAUSE` over all links.
    """
    if cache.moves is None or cache.lower is None:
        return {}
    found: dict[str, Any] = {}
    for name, tier in cache.residency.tiers.items():
        if name is not GPU:
            found[f"{name.value}_blocks"] = tier.capacity
            found[f"{name.value}_blocks_free"] = tier.num_empty
            found[f"{name.value}_blocks_evicted"] = cache.evictors[name].num_evicted
    for (source, destination), stats in cache.moves.stats.items():
        link = f"{source.value}_{destination.value}"
        found[f"moves_{link}"] = stats.num_moves
        found[f"moved_bytes_{link}"] = stats.num_bytes
        found[f"move_seconds_{link}"] = stats.seconds
        for cause, count in stats.failures.items():
            name_of = f"move_failures_{cause.value}"
            found[name_of] = found.get(name_of, 0) + count
    return found | {
        "moves_in_flight": len(cache.moves.tickets),
        "offers_waiting": cache.lower.num_queued,
        "blocks_lost": cache.moves.num_lost,
        "loads_joined": cache.loads.num_joined,
        "prefetched_blocks": cache.loads.num_prefetched,
        "resumed_tails": cache.loads.num_tails,
    }
