"""What every order of admission must do, run over each that is built in."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from ledger import VOCAB, expected_tokens, ledger_engine

from tierkv.engine.core import EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.policies import registry
from tierkv.policies.order import OrderPolicy, WaitingView

NAMES = registry.known("order")


@pytest.fixture(params=NAMES)
def order(request: pytest.FixtureRequest) -> OrderPolicy:
    made: OrderPolicy = registry.create("order", request.param)
    return made


def view(number: int, *, priority: int = 0, matched: int = 0, tenant: str = "") -> WaitingView:
    return WaitingView(float(number), number, priority, 10, matched)


def test_ranks_are_total_and_do_not_change_by_themselves(order: OrderPolicy) -> None:
    views = [view(i, priority=i % 3, matched=i % 4) for i in range(40)]
    first = [order.rank(each) for each in views]
    assert len(set(first)) == len(first)
    assert [order.rank(each) for each in views] == first
    assert all(isinstance(number, (int, float)) for rank in first for number in rank)


def test_equals_go_by_arrival(order: OrderPolicy) -> None:
    ranks = [order.rank(view(i, priority=1, matched=5)) for i in range(20)]
    assert all(earlier < later for earlier, later in pairwise(ranks))


def test_arrival_at_the_same_time_goes_by_number(order: OrderPolicy) -> None:
    same = [WaitingView(1.0, number, 0, 10, 0) for number in range(5)]
    assert sorted(map(order.rank, same)) == list(map(order.rank, same))


@pytest.mark.parametrize("name", NAMES)
def test_everyone_is_served_and_gets_the_same_tokens(name: str) -> None:
    """Requests of several tenants and priorities that come while others run; none is left."""
    rng = random.Random(7)
    core, _, clock = ledger_engine(
        num_blocks=24, block_size=4, scheduling_policy=name, max_num_seqs=4
    )
    asked: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    for number in range(60):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        request = EngineRequest(
            f"r{number}", prompt, SamplingParams(max_tokens=5), rng.randrange(3)
        )
        request.tenant = rng.choice(["", "a", "b"])
        core.add_request(request)
        asked[request.request_id] = prompt
        step(core, clock, got)
    for _ in range(2000):
        if not core.has_work:
            break
        step(core, clock, got)
    assert got == {name: expected_tokens(prompt, 5) for name, prompt in asked.items()}


def step(core, clock, got: dict[str, list[int]]) -> None:
    clock.time += 1.0
    for output in core.step():
        got.setdefault(output.request_id, []).extend(output.new_token_ids)
    core.check()
