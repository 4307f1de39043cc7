"""What `session-protect`, `retention` and `workload-aware` keep that LRU would not."""

from __future__ import annotations

import random

from tierkv.policies import registry
from tierkv.policies.base import EvictionPolicy
from tierkv.policies.retention import RetentionPolicy
from tierkv.policies.session_protect import SessionProtectPolicy
from tierkv.policies.workload_aware import WorkloadAwarePolicy
from tierkv.sim.instant import InstantTier
from tierkv.sim.trace import TraceRequest


def serve(tier: InstantTier, now: float, chain: int, count: int, **fields: str) -> int:
    """A request of the first blocks of a chain."""
    request = TraceRequest(now, count, 1, ((1000 * chain, count),), **fields)
    return tier.serve(request, request.block_ids())


def hits_of_rounds(policy: EvictionPolicy, sessions: int, *, named: bool = True) -> int:
    """Sessions that come in turn, 10 blocks each, into a tier of 60."""
    tier = InstantTier(policy, 60)
    return sum(
        serve(tier, float(number), number % sessions, 10, session=f"s{number % sessions}" * named)
        for number in range(sessions * 50)
    )


def test_members_stay_when_more_sessions_compete_than_fit() -> None:
    assert hits_of_rounds(registry.create("eviction", "lru"), sessions=10) == 0
    hits = hits_of_rounds(SessionProtectPolicy(), sessions=10)
    assert hits > 0.3 * (10 * 50 * 10), "4 of 10 sessions fit beside the one that runs"


def test_sessions_without_names_are_found_by_their_chains() -> None:
    lru = hits_of_rounds(registry.create("eviction", "lru"), sessions=6, named=False)
    hits = hits_of_rounds(SessionProtectPolicy(), sessions=6, named=False)
    assert hits == lru == (6 * 50 - 6) * 10, "all fit"


def test_a_member_that_is_idle_for_too_long_is_none() -> None:
    policy = SessionProtectPolicy(wait=0.5)
    tier = InstantTier(policy, 60)
    serve(tier, -1.0, 9, 60)
    for turn in range(40):
        serve(tier, float(turn), 1, 10, session="busy")
    assert policy._num_protected == 10
    serve(tier, 1000.0, 2, 10, session="other")
    assert policy._num_protected == 0
    victims = policy.propose(60, tier)
    assert victims.index(1009) < victims.index(2009), "LRU again"


def test_protection_ends_where_lru_does_better() -> None:
    """Sessions that soon come back for the last time, and old ones that never do."""
    generator = random.Random(3)
    policy = SessionProtectPolicy(wait=1.0)
    tier = InstantTier(policy, 60)
    for number in range(400):
        serve(tier, 3.0 * number, number, 10, session=f"s{number}")
        back = max(0, number - generator.choice([1, 2, 3, 4]))
        serve(tier, 3.0 * number + 1, back, 10, session=f"s{back}")
    assert policy._share < 0.4


def test_what_a_tool_call_left_is_held_back_until_it_returned() -> None:
    policy = RetentionPolicy()
    tier = InstantTier(policy, 60)
    for turn in range(80):
        serve(tier, 10.0 * turn, 1, 10, stop_reason="tool_call")
    now = 800.0
    serve(tier, now, 2, 10, stop_reason="tool_call")
    serve(tier, now + 5, 3, 10, stop_reason="end")
    victims = policy.propose(60, tier)
    assert victims.index(3009) < victims.index(2009), "tools return after 10 s"
    serve(tier, now + 15, 4, 10, stop_reason="end")
    victims = policy.propose(60, tier)
    assert victims.index(2009) < victims.index(4009), "its time is over"


def test_returns_of_evicted_chains_count() -> None:
    policy = RetentionPolicy()
    tier = InstantTier(policy, 10)
    for turn in range(40):
        serve(tier, 10.0 * turn, 1 + turn % 2, 8, stop_reason="tool_call")
    assert tier.num_evicted > 0
    assert policy._returns.quantile(0.5, 0.0) == 20.0


def test_a_class_that_comes_back_is_kept_longer() -> None:
    policy = WorkloadAwarePolicy()
    tier = InstantTier(policy, 60)
    for number in range(100):
        serve(tier, 4.0 * number, number, 4, stop_reason="end")
        serve(tier, 4.0 * number + 1, 500 + number, 4, stop_reason="tool_call")
        serve(tier, 4.0 * number + 2, 500 + number, 4, stop_reason="tool_call")
    now = 500.0
    serve(tier, now, 900, 4, stop_reason="tool_call")
    serve(tier, now + 0.1, 901, 4, stop_reason="end")
    victims = policy.propose(60, tier)
    assert victims.index(901_003) < victims.index(900_003)
