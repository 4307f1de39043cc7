"""The fair order: shares between tenants, in the policy alone and in the engine."""

from __future__ import annotations

from collections import Counter

import pytest
from ledger import VOCAB, ledger_engine

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.request import Request, Sequence
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.waiting import WaitingQueue
from tierkv.policies import registry
from tierkv.policies.fair import FairOrder
from tierkv.policies.order import FcfsOrder, ServiceOrder


def sequence(number: int, tenant: str, num_tokens: int, priority: int = 0) -> Sequence:
    tokens = list(range(num_tokens))
    request = Request(
        f"r{number}",
        tokens,
        SamplingParams(),
        max_tokens=1,
        arrival_s=float(number),
        priority=priority,
        tenant=tenant,
    )
    return Sequence(number, request, 0, tokens)


def queue_of(order: FairOrder, *members: Sequence) -> WaitingQueue:
    queue = WaitingQueue(order, lambda seq: 0)
    for seq in members:
        queue.add(seq)
    return queue


def names(queue: WaitingQueue) -> str:
    return "".join(seq.request.tenant for seq in queue)


def test_only_the_fair_order_asks_for_service() -> None:
    assert isinstance(registry.create("order", "fair"), ServiceOrder)
    assert not isinstance(FcfsOrder(), ServiceOrder)


def test_tenants_take_turns_by_tokens() -> None:
    """Two short ones of b count as one long one of a."""
    members = [sequence(i, "a", 20) for i in range(3)]
    members += [sequence(10 + i, "b", 10) for i in range(6)]
    assert names(queue_of(FairOrder(), *members)) == "abbabbabb"


def test_a_weight_is_a_share() -> None:
    order = FairOrder()
    order.set_weight("b", 3)
    members = [sequence(i, "a", 10) for i in range(4)] + [
        sequence(9 + i, "b", 10) for i in range(9)
    ]
    found = names(queue_of(order, *members))
    assert found[:8].count("b") == 6
    assert len(found) == 13


def test_what_was_served_counts() -> None:
    order = FairOrder(output_cost=2)
    members = [sequence(0, "a", 10), *(sequence(1 + i, "b", 10) for i in range(5))]
    queue = queue_of(order, *members)
    assert names(queue) == "abbbbb"
    order.admitted("a", 30)
    order.generated(["a", "a", "b"])
    assert (order.served("a"), order.served("b")) == (34, 2)
    assert names(queue) == "bbbbab"


def test_who_was_idle_has_saved_up_nothing() -> None:
    order = FairOrder()
    queue = queue_of(order, sequence(0, "a", 10))
    order.admitted("a", 1000)
    queue.add(sequence(1, "b", 10))
    assert order.served("b") == 1000


def test_after_an_empty_queue_the_last_one_served_counts() -> None:
    order = FairOrder()
    order.admitted("a", 500)
    queue = queue_of(order, sequence(0, "b", 10))
    assert order.served("b") == 500
    assert names(queue) == "b"


def test_within_a_tenant_by_priority_then_arrival() -> None:
    members = [sequence(0, "a", 5), sequence(1, "a", 5, priority=-1), sequence(2, "a", 5)]
    assert [seq.seq_id for seq in queue_of(FairOrder(), *members)] == [1, 0, 2]


def test_the_memory_of_tenants_is_bounded() -> None:
    order = FairOrder()
    for number in range(50_000):
        order.joined(f"t{number}", [])
        order.admitted(f"t{number}", 1)
    assert len(order._counters) <= 1 << 14


@pytest.mark.parametrize("spec", ["fair:output_cost=0", "fair:nonsense=1"])
def test_bad_parameters(spec: str) -> None:
    with pytest.raises(ValueError, match="fair"):
        registry.create("order", spec)


def test_a_weight_above_zero() -> None:
    with pytest.raises(ValueError, match="weight=0"):
        FairOrder().set_weight("a", 0)


def flood(policy: str, weights: dict[str, float] | None = None) -> Counter[str]:
    """Tokens served to each while `greedy` has 200 requests waiting and `modest` always two."""
    core, _, clock = ledger_engine(
        num_blocks=64, block_size=4, scheduling_policy=policy, max_num_seqs=4
    )
    for tenant, weight in (weights or {}).items():
        core.scheduler.waiting.service.set_weight(tenant, weight)
    for number in range(200):
        add(core, f"greedy-{number}", "greedy", number)
    served: Counter[str] = Counter()
    count = 0
    for _ in range(150):
        while sum(r.tenant == "modest" for r in core.scheduler.requests.values()) < 4:
            add(core, f"modest-{count}", "modest", 1000 + count)
            count += 1
        clock.time += 1.0
        for output in core.step():
            served[output.request_id.split("-")[0]] += len(output.new_token_ids)
        core.check()
    return served


def add(core: EngineCore, name: str, tenant: str, number: int) -> None:
    prompt = [(number * 7 + i * i) % VOCAB for i in range(8)]
    params = SamplingParams(max_tokens=6)
    core.add_request(EngineRequest(name, prompt, params, tenant=tenant))


def test_a_flood_takes_no_more_than_its_share() -> None:
    served = flood("fair")
    assert served["modest"] == pytest.approx(served["greedy"], rel=0.15)
    assert flood("fcfs")["modest"] == 0


def test_a_flood_against_a_weight() -> None:
    served = flood("fair", {"modest": 3})
    assert served["modest"] == pytest.approx(3 * served["greedy"], rel=0.25)
