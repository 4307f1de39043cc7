"""Putting blocks where a benchmark wants them."""

from __future__ import annotations

from tierkv import LLM
from tierkv.policies.base import Why
from tierkv.types import TierName


def settle(llm: LLM) -> None:
    """Let everything that is on its way to a lower tier arrive."""
    if not llm._engine.flush(60.0):
        raise RuntimeError("blocks did not reach the lower tiers within a minute")


def drop(llm: LLM, tier: TierName) -> int:
    """Drop every idle copy in one tier; returns how many."""
    cache = llm._engine.cache
    blocks = [b for b in cache.tree if tier in b.copies and b.copies[tier].is_evictable]
    for block in sorted(blocks, key=lambda b: -b.depth):
        cache.evictors[tier].drop(block, Why.REMOVED)
    return len(blocks)
