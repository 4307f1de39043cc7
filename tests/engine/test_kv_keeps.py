"""Pins, times to live, priorities and no_store: what pressure takes, and what it leaves."""

from __future__ import annotations

import pytest
from kv_run import BLOCK, GPU, KvRun, prompt_of

from tierkv.engine.kv_hints import KvHints
from tierkv.errors import ConflictError, NotFoundError, RequestError

PROMPT = prompt_of(1, 8 * BLOCK)


def press(run: KvRun, count: int, first: int = 100) -> None:
    """Strangers that need room."""
    for number in range(first, first + count):
        run.ask(prompt_of(number, 8 * BLOCK))


# -- no_store, ttl, priority ----------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [{}, {"cpu_blocks": 60}, {"nvme_blocks": 60}])
def test_nothing_is_kept_of_a_request_that_says_so(tiers: dict[str, int]) -> None:
    run = KvRun(num_blocks=40, **tiers)
    assert run.ask(PROMPT, no_store=True, tokens=6) == 0
    assert len(run.cache.tree) == 0
    assert run.ask(PROMPT) == 0
    assert run.ask(PROMPT, no_store=True) > 0, "it may use what is there"
    assert run.ask(PROMPT + [1] * 9, no_store=True) >= 7 * BLOCK
    assert run.held(PROMPT)["gpu"] == 8


def test_two_that_keep_nothing_do_not_wait_for_each_other() -> None:
    run = KvRun(num_blocks=40)
    names = [run.add(PROMPT, no_store=True, tokens=3), run.add(PROMPT, tokens=3)]
    run.step()
    assert len(run.core.scheduler.running) == 2
    run.finish()
    assert run.cached[names[1]] == 0


def test_what_keeps_nothing_is_never_swapped() -> None:
    run = KvRun(num_blocks=16, cpu_blocks=60, preemption_mode="swap", max_num_seqs=8)
    names = [run.add(prompt_of(i, 20), tokens=20, no_store=True) for i in range(4)]
    run.finish()
    metrics = run.core.metrics()
    assert metrics["preemptions"] > 0 and metrics["swaps"] == 0
    assert all(len(run.got[name]) == 20 for name in names)
    assert run.core.metrics()["cpu_used_bytes"] == 0


@pytest.mark.parametrize(
    "policy", ["lru", "fifo", "lfu", "sieve", "s3fifo", "arc", "tinylfu", "reuse"]
)
def test_expired_blocks_go_first(policy: str) -> None:
    run = KvRun(num_blocks=24, eviction_policy=policy)
    run.ask(PROMPT, ttl=50)
    other = prompt_of(2, 8 * BLOCK)
    run.ask(other)
    run.ask(PROMPT, ttl=50)  # used later than the other, by a request that wants it for a while
    run.pass_time(60)
    run.ask(prompt_of(3, 9 * BLOCK))
    assert run.held(other)["gpu"] == 8
    assert run.held(PROMPT)["gpu"] < 8


def test_before_its_time_is_over_a_block_is_like_any_other() -> None:
    run = KvRun(num_blocks=24)
    other = prompt_of(2, 8 * BLOCK)
    run.ask(other)
    run.ask(PROMPT, ttl=5000)
    run.ask(prompt_of(3, 9 * BLOCK))
    assert run.held(PROMPT)["gpu"] == 8
    assert run.held(other)["gpu"] < 8


def test_somebody_who_says_nothing_wants_it_for_good() -> None:
    run = KvRun(num_blocks=24)
    run.ask(PROMPT, ttl=50)
    run.ask(PROMPT)
    run.ask(prompt_of(2, 8 * BLOCK))
    run.ask(PROMPT)
    run.pass_time(100)
    run.ask(prompt_of(3, 9 * BLOCK))
    assert run.held(PROMPT)["gpu"] == 8


def test_a_ttl_does_not_count_for_what_others_had() -> None:
    run = KvRun(num_blocks=24)
    run.ask(PROMPT)
    run.ask(PROMPT, ttl=1)
    run.pass_time(10)
    kept = [block.kept for block in run.cache.tree]
    assert not any(k is not None and k.is_expired for k in kept)


def test_a_block_that_expired_is_used_again() -> None:
    run = KvRun(num_blocks=24)
    run.ask(PROMPT, ttl=5)
    run.pass_time(50)
    assert all(b.kept is not None and b.kept.is_expired for b in run.cache.tree)
    assert run.ask(PROMPT, ttl=500) > 0
    assert sum(b.kept is not None and b.kept.is_expired for b in run.cache.tree) <= 1


def test_the_memory_of_timers_is_bounded() -> None:
    run = KvRun(num_blocks=12)
    for number in range(600):
        run.ask(prompt_of(number, 4 * BLOCK), ttl=1e9)
    assert len(run.cache.keeps._timers) < 1500


@pytest.mark.parametrize("tiers", [{}, {"cpu_blocks": 24}])
def test_what_has_priority_stays(tiers: dict[str, int]) -> None:
    run = KvRun(num_blocks=24, **tiers)
    low, high = prompt_of(2, 4 * BLOCK), prompt_of(3, 4 * BLOCK)
    run.ask(high, priority=7)
    run.ask(low, priority=-7)
    for number in range(10, 16):
        run.ask(prompt_of(number, 6 * BLOCK))
    tier = "cpu" if tiers else "gpu"
    assert run.held(high)[tier] == 4
    assert run.held(low) == dict.fromkeys(run.held(low), 0)


def test_the_highest_priority_of_its_users_counts() -> None:
    run = KvRun(num_blocks=24)
    run.ask(PROMPT, priority=-50)
    run.ask(PROMPT, priority=20)
    run.ask(PROMPT, priority=3)
    assert {b.kept.priority for b in run.cache.tree if b.kept is not None} == {20}
    other = prompt_of(2, 4 * BLOCK)
    run.ask(other)
    run.ask(other, priority=-50)
    block = run.cache.tree.get(run.control._keys_of("", other)[0])
    assert block is not None and block.kept is None


def test_hints_reach_policies() -> None:
    run = KvRun(num_blocks=24)
    told = []
    policy = run.cache.evictors[GPU].policy
    insert = policy.insert
    policy.insert = lambda key, parent, hint: (told.append(hint), insert(key, parent, hint))[1]
    run.ask(PROMPT, session_id="s", turn="tool_call", tenant="t")
    run.ask(PROMPT + [1] * 2 * BLOCK, session_id="s", tenant="t")
    run.ask(prompt_of(3, 2 * BLOCK))
    seen = {(h.session, h.turn, h.stop_reason, h.tenant) for h in told}
    assert seen == {("s", 1, "tool_call", "t"), ("s", 2, "", "t"), ("", 0, "", "")}


# -- pins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tiers", [{"cpu_blocks": 40}, {"nvme_blocks": 40}, {"cpu_blocks": 12, "nvme_blocks": 40}]
)
def test_a_pinned_prefix_survives_what_evicts_others(tiers: dict[str, int]) -> None:
    run = KvRun(num_blocks=16, pin_budget=32 * 100, **tiers)
    other = prompt_of(2, 8 * BLOCK)
    run.ask(PROMPT)
    answer = run.control.pin("", "", PROMPT)
    assert (answer["pinned_tokens"], answer["pinned_bytes"]) == (32, 8 * 32)
    run.settle()
    *_, last = run.cache.evictors
    assert run.held(PROMPT)[last.value] == 8
    run.ask(other)
    assert run.held(other)[last.value] == 8
    press(run, 12)
    assert run.held(PROMPT)[last.value] == 8
    assert run.held(other)[last.value] == 0
    assert run.ask(PROMPT) >= 7 * BLOCK
    run.control.unpin("", "", PROMPT)
    press(run, 12, first=200)
    assert run.held(PROMPT)[last.value] < 8


@pytest.mark.parametrize("policy", ["write-back", "second-hit"])
def test_a_pinned_block_goes_down_at_once_whatever_the_admission_policy_says(policy: str) -> None:
    tiers = {"cpu_blocks": 40, "nvme_blocks": 40}
    run = KvRun(num_blocks=40, admission_policy=policy, **tiers)
    run.ask(PROMPT)
    assert run.held(PROMPT) == {"gpu": 8, "cpu": 0, "nvme": 0}
    run.control.pin("", "", PROMPT)
    run.settle()
    assert run.held(PROMPT) == {"gpu": 8, "cpu": 8, "nvme": 8}


def test_pinned_blocks_of_the_pool_alone_go_last_but_do_go() -> None:
    run = KvRun(num_blocks=20, pin_budget=32 * 10)
    run.ask(PROMPT)
    run.control.pin("", "", PROMPT)
    press(run, 6)
    assert run.held(PROMPT)["gpu"] == 8
    run.ask(prompt_of(2, 19 * BLOCK), tokens=2)  # the whole pool
    assert run.held(PROMPT)["gpu"] == 0
    run.ask(PROMPT)
    press(run, 6, first=300)
    assert run.held(PROMPT)["gpu"] == 8, "computed again, it is pinned again"


def test_in_the_pool_a_pinned_block_is_ordinary_once_it_is_below() -> None:
    run = KvRun(num_blocks=16, cpu_blocks=40, pin_budget=8 * 32)
    run.ask(PROMPT)
    run.control.pin("", "", PROMPT)
    run.settle()
    press(run, 3)
    assert run.held(PROMPT) == {"gpu": 0, "cpu": 8}


def test_a_pin_waits_for_a_tier_that_turned_it_away() -> None:
    run = KvRun(num_blocks=40, nvme_blocks=40, nvme_write_rate=1)
    run.add(PROMPT)
    run.finish()
    run.control.pin("", "", PROMPT)
    for _ in range(3):
        run.core.work_in_background()
    assert 0 < run.held(PROMPT)["nvme"] < 8
    assert run.core.has_background_work, "it is tried again although nobody asks for anything"
    run.settle()
    assert run.held(PROMPT)["nvme"] == 8
    assert not run.cache.keeps.has_unsettled


def test_a_pin_gets_its_place_while_others_are_on_their_way_out() -> None:
    """A full tier makes room by sending others down first, and turns away who comes meanwhile."""
    run = KvRun(num_blocks=40, cpu_blocks=12, nvme_blocks=60, pin_budget=32 * 40)
    press(run, 6)
    for number in range(3):
        prompt = prompt_of(number, 8 * BLOCK)
        run.add(prompt)
        run.finish()
        run.control.pin("", "", prompt)
    run.settle()
    assert [run.held(prompt_of(number, 8 * BLOCK))["nvme"] for number in range(3)] == [8, 8, 8]


def test_a_pin_may_end_by_itself() -> None:
    run = KvRun(num_blocks=16, cpu_blocks=16, pin_budget=8 * 32)
    run.ask(PROMPT)
    run.control.pin("", "", PROMPT, None, 100)
    run.settle()
    press(run, 4)
    assert run.held(PROMPT)["cpu"] == 8
    run.pass_time(200)
    assert run.control.stats()["pins"]["count"] == 0
    press(run, 4, first=200)
    assert run.held(PROMPT)["cpu"] < 8


def test_the_budget_is_a_bound_with_numbers() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40)
    assert run.control.stats()["pins"]["budget_bytes"] == 10 * 32, "a quarter of the last tier"
    run.ask(PROMPT)
    run.control.pin("", "", PROMPT)
    longer, other = PROMPT + [1] * 8, prompt_of(2, 3 * BLOCK)
    run.ask(longer)
    run.ask(other)
    run.control.pin("", "", longer)  # two blocks more, eight are pinned already
    with pytest.raises(ConflictError, match="10 blocks, 10 are pinned"):
        run.control.pin("", "", other)
    run.control.unpin("", "", longer)
    with pytest.raises(ConflictError, match="8 are pinned"):
        run.control.pin("", "", other)
    run.control.unpin("", "", PROMPT)
    run.control.pin("", "", other)
    assert run.control.stats()["pins"]["pinned_bytes"] == 3 * 32
    with pytest.raises(NotFoundError):
        run.control.unpin("", "", PROMPT)


def test_a_pin_that_is_refused_leaves_the_one_before() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40)
    run.ask(PROMPT, session_id="s")
    run.control.pin("", "", None, "s")
    run.ask(PROMPT + [1] * 40, session_id="s")
    with pytest.raises(ConflictError):
        run.control.pin("", "", None, "s")
    assert run.cache.keeps.num_pinned == 8
    run.control.unpin("", "", None, "s")
    assert run.cache.keeps.num_pinned == 0


def test_overlapping_pins_are_counted_once_and_end_one_by_one() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=80)
    longer = PROMPT + [1] * 8
    run.ask(longer)
    run.control.pin("", "", PROMPT)
    run.control.pin("", "", longer)
    assert run.cache.keeps.num_pinned == 10
    run.control.unpin("", "", PROMPT)
    assert run.cache.keeps.num_pinned == 10
    run.core.check()
    run.control.unpin("", "", longer)
    assert run.cache.keeps.num_pinned == 0
    assert not any(b.kept is not None and b.kept.is_pinned for b in run.cache.tree)


def test_a_request_that_needs_the_whole_pool_still_runs() -> None:
    for tiers in ({}, {"cpu_blocks": 8}, {"nvme_blocks": 8}):
        run = KvRun(num_blocks=12, pin_budget=10**9, **tiers)
        for number in range(2):  # all of the last tier
            prompt = prompt_of(number, 4 * BLOCK)
            run.ask(prompt)
            run.control.pin("", "", prompt)
        run.settle()
        assert run.ask(prompt_of(9, 11 * BLOCK), tokens=4) == 0
        names = [run.add(prompt_of(20 + i, 5 * BLOCK), tokens=9) for i in range(6)]
        run.finish()
        assert all(len(run.got[name]) == 9 for name in names)


def test_tenants_share_the_budget_by_weight() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=64)
    run.set_tenants(weights={"a": 3.0, "b": 1.0}, a={}, b={})
    for tenant in ("a", "b"):
        run.ask(PROMPT, tenant=tenant)
    run.control.pin("a", "a", PROMPT)
    with pytest.raises(ConflictError, match="of b is 4 blocks, 0 are pinned"):
        run.control.pin("b", "b", PROMPT)
    run.ask(PROMPT[:16], tenant="b")
    run.control.pin("b", "b", PROMPT[:16])
    assert run.control.stats("b")["pins"] == {
        "count": 1, "pinned_bytes": 4 * 32, "budget_bytes": 4 * 32
    }  # fmt: skip
    assert run.control.stats()["pins"]["pinned_bytes"] == 12 * 32


def test_no_tenant_has_all_the_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.cache.keeps._MOST_PINS", 4)
    run = KvRun(num_blocks=24, cpu_blocks=60, pin_budget=32 * 60)
    run.set_tenants(a={}, b={})
    for tenant in ("a", "b"):
        run.ask(PROMPT, tenant=tenant)
        for count in (1, 2):
            run.control.pin(tenant, tenant, PROMPT[: count * BLOCK])
        run.control.pin(tenant, tenant, PROMPT[:BLOCK])  # again: in the place of the first
        with pytest.raises(ConflictError, match="at most 2 pins"):
            run.control.pin(tenant, tenant, PROMPT[: 3 * BLOCK])


def test_tenants_whose_names_run_into_session_ids_have_pins_of_their_own() -> None:
    run = KvRun(num_blocks=24, cpu_blocks=60, pin_budget=32 * 60)
    run.set_tenants(**{"a": {}, "a b": {}})
    run.ask(PROMPT, tenant="a", session_id="b c")
    run.ask(PROMPT, tenant="a b", session_id="c")
    run.control.pin("a", "a", None, "b c")
    run.control.pin("a b", "a b", None, "c")
    assert len(run.cache.keeps.pins) == 2
    run.control.unpin("a", "a", None, "b c")
    assert run.control.stats("a b")["pins"]["count"] == 1
    assert run.control.stats("a")["pins"]["count"] == 0


@pytest.mark.parametrize("bad", [-1, 10**6, 2**32])
def test_tokens_that_no_model_has_are_refused_and_not_hashed(bad: int) -> None:
    run = KvRun(num_blocks=24)
    calls = [run.control.pin, run.control.unpin, run.control.ttl]
    for call in calls:
        with pytest.raises(RequestError, match="token ids must be in"):
            call("", "", [bad] * 2 * BLOCK)
    with pytest.raises(RequestError, match="token ids must be in"):
        run.control.where("", [bad] * 2 * BLOCK)


def test_what_cannot_be_pinned_says_why() -> None:
    run = KvRun(num_blocks=40)
    with pytest.raises(NotFoundError, match="warm it first"):
        run.control.pin("", "", PROMPT)
    with pytest.raises(RequestError, match="shorter than a block"):
        run.control.pin("", "", PROMPT[:3])
    with pytest.raises(NotFoundError, match="no request of it"):
        run.control.pin("", "", None, "nobody")
    with pytest.raises(RequestError, match="ttl"):
        run.control.pin("", "", PROMPT, None, -1)


def test_a_session_is_named_by_its_last_request() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40)
    run.ask(PROMPT[:16], session_id="s")
    run.ask(PROMPT, session_id="s", tokens=5)
    run.ask(PROMPT, session_id="s", tenant="other")
    answer = run.control.pin("", "", None, "s")
    assert answer["pinned_tokens"] == 36
    assert run.control.ttl("", "", None, "s", 0)["tokens"] == 36
    run.pass_time(1)
    assert not any(b.kept.is_expired for b in run.cache.tree if b.kept and not b.kept.is_pinned)


def test_a_request_that_left_the_queue_says_nothing_of_its_session() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40)
    run.ask(PROMPT, session_id="s")
    run.core.abort([run.add(PROMPT + PROMPT, session_id="s")])
    run.finish()
    assert run.control.pin("", "", None, "s")["pinned_tokens"] == 32


def test_the_ttl_of_a_prefix_is_set_and_taken_back() -> None:
    run = KvRun(num_blocks=24)
    other = prompt_of(2, 8 * BLOCK)
    for prompt in (PROMPT, other):
        run.ask(prompt)
    assert run.control.ttl("", "", other, None, 10) == {"tokens": 32}
    assert run.control.ttl("", "", PROMPT, None, 10) == {"tokens": 32}
    assert run.control.ttl("", "", PROMPT, None, None) == {"tokens": 32}
    run.pass_time(20)
    run.ask(prompt_of(3, 9 * BLOCK))
    assert run.held(PROMPT)["gpu"] == 8
    assert run.held(other)["gpu"] < 8


def test_a_shorter_time_takes_the_place_of_a_longer_one() -> None:
    run = KvRun(num_blocks=24)
    run.ask(PROMPT, ttl=1000)
    run.control.ttl("", "", PROMPT, None, 5)
    run.pass_time(10)
    assert all(b.kept is not None and b.kept.is_expired for b in run.cache.tree)


def test_forgetting_all_forgets_pinned_blocks_too() -> None:
    run = KvRun(num_blocks=24, cpu_blocks=24, pin_budget=8 * 32)
    run.ask(PROMPT)
    run.control.pin("", "", PROMPT)
    run.settle()
    assert run.core.reset_prefix_cache()
    assert len(run.cache.tree) == 0
    run.core.check()
    assert KvHints.parse({"ttl": 1}) is not None
