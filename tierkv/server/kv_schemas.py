"""What `/kv/*` answers, for the OpenAPI schema."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class KvTier(BaseModel):
    """One tier."""

    capacity_bytes: int
    used_bytes: int
    evictable_bytes: int
    evicted_blocks: int


class KvPins(BaseModel):
    """What is pinned, and what may be."""

    count: int
    pinned_bytes: int
    budget_bytes: int


class KvTenant(BaseModel):
    """What a tenant with quotas keeps, by tier."""

    used_bytes: dict[str, int]
    quota_bytes: dict[str, int]


class KvStats(BaseModel):
    """Tiers, pins, moves; with a tenant's key, its own pins and quotas."""

    block_size: int
    block_bytes: int
    state: Literal["awake", "falling asleep", "asleep"]
    tiers: dict[str, KvTier]
    pins: KvPins
    sessions: int
    tenants: dict[str, KvTenant]
    moves: int
    offers: int
    erasures: int


class KvWarmed(BaseModel):
    """Where a prefix is, and what had to be computed; with `pin`, what `/kv/pin` answers too."""

    tokens: int
    cached_tokens: int
    cached_tokens_by_tier: dict[str, int]
    computed_tokens: int
    pinned_tokens: int | None = None
    pinned_bytes: int | None = None
    budget_bytes: int | None = None


class KvPinned(BaseModel):
    """What a pin covers, and what its tenant has pinned altogether."""

    pinned_tokens: int
    tokens: int
    pinned_bytes: int
    budget_bytes: int


class KvUnpinned(BaseModel):
    """Done."""

    unpinned: Literal[True]


class KvTimed(BaseModel):
    """How many tokens' blocks are there, whose time was set."""

    tokens: int


class KvFlushed(BaseModel):
    """Whether all has arrived in time, and what is still on its way."""

    flushed: bool
    moves: int
    offers: int
    erasures: int


class KvImported(BaseModel):
    """How much of a file is there now."""

    session_id: str
    tokens: int
    imported_blocks: int
    known_blocks: int
    is_complete: bool


class KvSleep(BaseModel):
    """Whether the engine works, and the bytes of the pool that the system got back."""

    state: Literal["awake", "falling asleep", "asleep"]
    bytes_given_back: int


class Sleeping(BaseModel):
    """vLLM's."""

    is_sleeping: bool
