"""What a policy is told of a block's cost: how it would come back, tier by tier."""

from __future__ import annotations

from typing import ClassVar

from hand_mover import BLOCK, CPU, GPU, NVME, Bench

from tierkv.cache.hashing import pack_tokens
from tierkv.cache.lower_tiers import MoveLimits, TierSpec
from tierkv.cache.tiered_cache import TieredCache
from tierkv.policies.admission import WriteThrough
from tierkv.policies.base import AccessHint, Key
from tierkv.policies.lru import LruPolicy
from tierkv.types import TierName


class Prices:
    """A `CostModel` of round numbers that counts how often it is asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    def compute_s(self, start: int, num_tokens: int) -> float:
        self.num_asked += 1
        return num_tokens * (10 + start)

    def up_s(self, tier: TierName, num_blocks: int) -> float:
        self.num_asked += 1
        return 500 + num_blocks * {CPU: 2, NVME: 7}[tier]

    def down_s(self, tier: TierName, num_blocks: int) -> float:
        raise AssertionError("nobody asks this")


class Listener(LruPolicy):
    """Keeps the last hint of each block."""

    uses_cost: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.hints: dict[Key, AccessHint] = {}

    def insert(self, key: Key, parent: Key | None, hint: AccessHint) -> None:
        self.hints[key] = hint
        super().insert(key, parent, hint)

    def touch(self, key: Key, hint: AccessHint) -> None:
        self.hints[key] = hint
        super().touch(key, hint)


def costs(policy: Listener) -> list[tuple[float, float]]:
    """Load and recompute seconds, by depth."""
    hints = sorted(policy.hints.values(), key=lambda hint: hint.depth)
    return [(hint.load_s, hint.recompute_s) for hint in hints]


def test_each_tier_is_told_what_it_would_take_to_bring_the_block_back() -> None:
    bench, listeners = Bench(), {tier: Listener() for tier in (GPU, CPU, NVME)}
    bench.cache = TieredCache(
        32,
        BLOCK,
        listeners[GPU],
        bench.clock,
        tiers=[TierSpec(t, 20, listeners[t], WriteThrough()) for t in (CPU, NVME)],
        mover=bench.mover,
        limits=MoveLimits(step_bytes=1000, link_bytes=1000, room=0.0),
        cost=Prices(),
    )
    computed = [BLOCK * (10 + BLOCK * depth) for depth in range(3)]
    seq = bench.compute(range(12))
    assert costs(listeners[GPU]) == [(0, s) for s in computed], "nothing below has them"
    bench.settle()
    bench.cache.release(seq)
    again = bench.sequence(range(13))
    bench.admit(again)
    assert costs(listeners[GPU]) == [(2, s) for s in computed]
    assert costs(listeners[CPU]) == [(7, s) for s in computed]
    assert costs(listeners[NVME]) == [(0, s) for s in computed]


def test_who_does_not_ask_costs_nothing() -> None:
    prices = Prices()
    bench = Bench(cpu=20, cost=prices)
    bench.cache.release(bench.compute(range(16)))
    bench.settle()
    assert prices.num_asked == 0


def test_a_hint_keeps_all_that_it_said() -> None:
    bench = Bench(cost=Prices(), eviction="gdsf")
    told: list[AccessHint] = []
    policy = bench.cache.evictors[GPU].policy
    policy.touch = lambda key, hint: told.append(hint)  # type: ignore[method-assign]
    seq = bench.sequence(range(8))
    seq.priority = 3
    bench.clock.time = 11.0
    bench.admit(seq)
    bench.cache.grow(seq, 8)
    seq.num_computed = 8
    bench.cache.seal(seq, 8)
    bench.cache.release(seq)
    (last, first) = told
    assert (first.now, first.depth, first.tokens, first.priority) == (11.0, 0, BLOCK, 3)
    assert first.ends_use and last.ends_use and last.depth == 1


def test_gdsf_gives_up_first_what_comes_back_fast() -> None:
    """Of two prompts used as often, the one that a lower tier holds leaves first."""
    bench = Bench(pool=8, cpu=4, eviction="gdsf", cost=Prices())
    bench.cache.release(bench.compute(range(100, 116)))
    bench.cache.lower.clear_offers()
    bench.cache.release(bench.compute(range(16)))
    bench.settle()
    for start in (0, 100):
        seq = bench.sequence(range(start, start + 17))
        bench.admit(seq)
        bench.cache.release(seq)
    bench.cache.lower.clear_offers()
    bench.cache.release(bench.compute(range(200, 204)))
    last = {start: pack_tokens(range(start + 12, start + 16)) for start in (0, 100)}
    in_pool = {b.tokens for b in bench.cache.tree if GPU in b.copies}
    assert last[0] not in in_pool and last[100] in in_pool
