"""Whom each victim policy preempts."""

from __future__ import annotations

import pytest

from tierkv.policies import registry
from tierkv.policies.victim import RunningView


def view(number: int, priority: int, blocks: int, recompute_s: float, swap_s: float) -> RunningView:
    return RunningView(number, priority, 0.0, number, blocks, blocks * 16, recompute_s, swap_s)


@pytest.mark.parametrize(
    ("name", "seq_id"), [("latest", 4), ("priority", 2), ("largest", 3), ("cheapest", 1)]
)
def test_choice(name: str, seq_id: int) -> None:
    candidates = [
        view(1, 0, 5, recompute_s=9.0, swap_s=0.5),
        view(2, 1, 5, recompute_s=0.6, swap_s=2.0),
        view(3, 0, 9, recompute_s=3.0, swap_s=3.0),
        view(4, 0, 2, recompute_s=1.0, swap_s=1.0),
    ]
    assert registry.create("victim", name).choose(candidates) == seq_id


def test_cheapest_without_costs_takes_the_shortest_then_the_latest() -> None:
    candidates = [RunningView(i, 0, 0.0, i, 1, tokens) for i, tokens in enumerate((9, 3, 3, 5))]
    assert registry.create("victim", "cheapest").choose(candidates) == 2


def test_cheapest_where_swapping_is_impossible() -> None:
    views = [RunningView(i, 0, 0.0, i, 1, 1, recompute_s=cost) for i, cost in enumerate((2.0, 1.0))]
    assert registry.create("victim", "cheapest").choose(views) == 1
