"""Quotas: a tenant gives up its own, never another's; nobody starves; nothing is miscounted."""

from __future__ import annotations

import pytest
from kv_run import BLOCK, CPU, GPU, NVME, KvRun, prompt_of

from tierkv.cache.shares import Share
from tierkv.types import TierName


def share_of(run: KvRun, tenant: str) -> Share:
    return run.cache.shares[tenant]


def fill(run: KvRun, tenant: str, count: int, first: int = 0, size: int = 4) -> None:
    for number in range(first, first + count):
        run.ask(prompt_of(number, size * BLOCK), tenant=tenant)


@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo", "arc"])
def test_in_the_pool_a_tenant_at_its_quota_gives_up_its_own(policy: str) -> None:
    run = KvRun(num_blocks=40, eviction_policy=policy)
    run.set_tenants(greedy={"gpu": 12}, modest={})
    fill(run, "modest", 4)
    fill(run, "greedy", 20)
    assert share_of(run, "greedy").counts[GPU] <= 12
    assert sum(run.held(prompt_of(i, 16), "modest")["gpu"] for i in range(4)) == 16
    assert run.cache.num_empty == 40 - 16 - share_of(run, "greedy").counts[GPU]


@pytest.mark.parametrize("tiers", [{"cpu_blocks": 40}, {"nvme_blocks": 40}])
def test_in_a_lower_tier_a_quota_is_never_exceeded(tiers: dict[str, int]) -> None:
    run = KvRun(num_blocks=60, **tiers)
    tier = CPU if "cpu_blocks" in tiers else NVME
    run.set_tenants(greedy={tier.value: 10}, modest={})
    fill(run, "modest", 4)
    for number in range(15):
        run.add(prompt_of(number, 16), tenant="greedy")
        while run.core.has_work or run.core.has_background_work:
            run.step()
            assert share_of(run, "greedy").counts[tier] <= 10
    assert sum(run.held(prompt_of(i, 16), "modest")[tier.value] for i in range(4)) == 16
    assert share_of(run, "greedy").counts[tier] > 6


def test_it_gives_up_what_is_worth_least_to_it() -> None:
    run = KvRun(num_blocks=60)
    run.set_tenants(a={"gpu": 12})
    fill(run, "a", 3)
    run.ask(prompt_of(0, 16), tenant="a")  # used again
    fill(run, "a", 1, first=9)
    assert [run.held(prompt_of(i, 16), "a")["gpu"] for i in (0, 1, 2, 9)] == [4, 0, 4, 4]


def test_a_quota_refuses_no_request() -> None:
    run = KvRun(num_blocks=40)
    run.set_tenants(a={"gpu": 5}, b={})
    fill(run, "b", 2)
    assert run.ask(prompt_of(1, 20 * BLOCK), tenant="a", tokens=9) == 0
    assert share_of(run, "a").counts[GPU] <= 5, "what was too much has gone"
    assert sum(run.held(prompt_of(i, 16), "b")["gpu"] for i in range(2)) == 8


def test_one_sequence_of_a_tenant_always_runs_and_others_as_far_as_the_quota_goes() -> None:
    run = KvRun(num_blocks=60, max_num_seqs=16)
    run.set_tenants(a={"gpu": 10}, b={})
    names = [run.add(prompt_of(i, 16), tenant="a", tokens=3) for i in range(6)]
    others = [run.add(prompt_of(i, 16), tenant="b", tokens=3) for i in range(4)]
    run.step()
    running = [seq.tenant for seq in run.core.scheduler.running.values()]
    assert running.count("a") == 2 and running.count("b") == 4
    run.finish()
    assert all(len(run.got[name]) == 3 for name in names + others)


def test_a_quota_of_nothing_keeps_a_tenant_out_of_a_tier() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40, nvme_blocks=40)
    run.set_tenants(a={"cpu": 0, "nvme": 0})
    fill(run, "a", 5)
    assert share_of(run, "a").counts == {GPU: 20}


def test_tenants_do_not_find_what_others_computed() -> None:
    run = KvRun(num_blocks=60, cpu_blocks=60)
    run.set_tenants(a={"cpu": 30}, b={"cpu": 30})
    prompt = prompt_of(1, 32)
    assert run.ask(prompt, tenant="a") == 0
    assert run.ask(prompt, tenant="b") == 0
    assert run.ask(prompt, tenant="a") > 0
    assert run.held(prompt, "a") == run.held(prompt, "b")


@pytest.mark.parametrize("kind", ["swap", "recompute"])
def test_counts_follow_sequences_that_are_preempted(kind: str) -> None:
    run = KvRun(num_blocks=20, cpu_blocks=40, preemption_mode=kind, max_num_seqs=8)
    run.set_tenants(a={"gpu": 14, "cpu": 12}, b={"gpu": 14, "cpu": 12})
    names = [run.add(prompt_of(i, 12), tenant="ab"[i % 2], tokens=16) for i in range(8)]
    run.finish()
    run.settle()
    counted = run.core.metrics()
    assert counted["preemptions"] > 0
    assert (counted["swaps"] > 0) == (kind == "swap")
    assert all(len(run.got[name]) == 16 for name in names)
    assert share_of(run, "a").counts[CPU] <= 12


def test_what_was_there_before_a_restart_is_its_tenants() -> None:
    run = KvRun(num_blocks=60, nvme_blocks=60)
    fill(run, "a", 5)  # before anyone has said that there is a quota
    fill(run, "b", 2)
    run.set_tenants(a={"nvme": 8, "gpu": 40})
    assert share_of(run, "a").counts == {GPU: 20, NVME: 20}
    run.core.check()
    fill(run, "a", 3, first=50)
    assert share_of(run, "a").counts[NVME] <= 8
    assert sum(run.held(prompt_of(i, 16), "b")["nvme"] for i in range(2)) == 8


def test_salts_that_nobody_knew_are_adopted_when_they_are_used() -> None:
    run = KvRun(num_blocks=60)
    run.ask(prompt_of(1, 16), tenant="a", salt="of a request")
    run.set_tenants(a={"gpu": 20})
    assert share_of(run, "a").counts[GPU] == 0
    run.ask(prompt_of(1, 20), tenant="a", salt="of a request")
    assert share_of(run, "a").counts[GPU] == 5


def test_pinned_blocks_of_a_tenant_at_its_quota() -> None:
    """They are its own: what it pins takes room from itself."""
    run = KvRun(num_blocks=40, cpu_blocks=40, pin_budget=40 * 32)
    run.set_tenants(a={"cpu": 8}, b={})
    prompt = prompt_of(1, 8 * BLOCK)
    run.ask(prompt, tenant="a")
    run.control.pin("a", "a", prompt)
    run.settle()
    assert run.held(prompt, "a")["cpu"] == 8
    fill(run, "a", 10, first=20)
    assert run.held(prompt, "a")["cpu"] == 8
    assert share_of(run, "a").counts[CPU] == 8
    run.control.unpin("a", "a", prompt)
    fill(run, "a", 10, first=40)
    assert run.held(prompt, "a")["cpu"] < 8


def test_stats_show_shares() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40)
    run.set_tenants(a={"cpu": 8}, b={"gpu": 4})
    fill(run, "a", 1)
    size = run.core.info.block_bytes
    found = run.control.stats()["tenants"]
    assert found["a"] == {
        "used_bytes": {"gpu": 4 * size, "cpu": 4 * size},
        "quota_bytes": {"cpu": 8 * size},
    }
    assert list(run.control.stats("b")["tenants"]) == ["b"]
    assert [tier.value for tier in TierName][:2] == list(found["a"]["used_bytes"])
