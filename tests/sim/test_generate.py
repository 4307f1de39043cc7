"""Generated workloads: what their knobs say is what comes out."""

from __future__ import annotations

import tracemalloc
from collections import defaultdict
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import pytest

from tierkv.errors import ConfigError
from tierkv.sim.generate import generate_trace
from tierkv.sim.trace import TraceRequest
from tierkv.sim.workloads import WORKLOADS


def sessions_of(requests: list[TraceRequest]) -> list[list[TraceRequest]]:
    found = defaultdict(list)
    for request in requests:
        found[request.session].append(request)
    return list(found.values())


def generated(workload: str, count: int = 3000, **knobs: Any) -> list[TraceRequest]:
    return list(generate_trace(workload, num_requests=count, **knobs))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_is_a_trace(workload: str) -> None:
    size, most = WORKLOADS[workload].block_size, WORKLOADS[workload].max_context
    requests = generated(workload, branch_share=0.1)
    assert len(requests) == 3000
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(requests))
    parents: dict[int, int] = {}
    for request in requests:
        ids = request.block_ids()
        assert len(ids) == request.input_tokens // size
        assert request.output_tokens >= 1 and request.input_tokens + request.output_tokens <= most
        for parent, block in pairwise([-1, *ids]):
            assert parents.setdefault(block, parent) == parent
    for session in sessions_of(requests):
        assert [request.turn for request in session] == [*range(1, len(session) + 1)]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_is_a_trace(workload: str) -> None:
    trace = generate_trace(workload, num_requests=50, seed=5)
    assert list(trace) == list(trace) == generated(workload, 50, seed=5)
    assert list(trace) != generated(workload, 50, seed=6)


def test_the_next_prompt_goes_on_where_the_last_answer_ended() -> None:
    for session in sessions_of(generated("agents", max_context=1 << 20)):
        for a, b in pairwise(session):
            assert b.input_tokens > a.input_tokens + a.output_tokens
            assert b.block_ids()[: a.num_blocks] == a.block_ids()


def test_branches_leave_the_length_and_change_ids() -> None:
    sessions = sessions_of(generated("chat", turns=20, branch_share=0.5))
    pairs = [pair for session in sessions for pair in pairwise(session)]
    changed = [b.block_ids()[: a.num_blocks] != a.block_ids() for a, b in pairs]
    assert 0.3 < fmean(changed) < 0.55
    shorter = [b for a, b in pairs if b.input_tokens < a.input_tokens]
    assert len(shorter) < 0.02 * len(pairs)  # these began anew, above the context


def test_above_the_context_a_session_begins_anew() -> None:
    knobs: dict[str, Any] = {"max_context": 4000, "system_tokens": 640, "turns": 50}
    sessions = sessions_of(generated("chat", first_spread=0, **knobs))
    shrunk = [(a, b) for s in sessions for a, b in pairwise(s) if b.input_tokens < a.input_tokens]
    assert shrunk
    for a, b in shrunk:
        assert b.block_ids()[:10] == a.block_ids()[:10]
        assert not set(b.block_ids()[10:]) & set(a.block_ids()[10:])


def test_tool_calls_are_followed_soon() -> None:
    gaps: dict[str, list[float]] = {"end": [], "tool_call": []}
    requests = generated("coding", tool_share=0.7, turns=20)
    for session in sessions_of(requests):
        assert len(session) < 3 or session[-1].stop_reason in ("end", "tool_call")
        for a, b in pairwise(session):
            gaps[a.stop_reason].append(b.arrival_s - a.arrival_s)
    assert 0.65 < len(gaps["tool_call"]) / sum(map(len, gaps.values())) < 0.75
    assert 14 < median(gaps["tool_call"]) < 18 and 140 < median(gaps["end"]) < 230


def test_documents_are_shared_by_popularity() -> None:
    requests = generated("rag", turns=1, system_tokens=0, session_documents=1)
    firsts = [request.block_ids()[0] for request in requests if request.runs]
    counts = sorted((firsts.count(block) for block in set(firsts)), reverse=True)
    assert 0.07 < counts[0] / len(firsts) < 0.14  # 1 / H(10,000) = 0.102
    assert 1.5 < counts[0] / counts[1] < 2.7
    assert len({request.session for request in requests}) == len(requests)


def test_rates_and_tenants() -> None:
    requests = generated("rag", turns=1, session_rate=5.0, num_tenants=3)
    assert 550 < requests[-1].arrival_s < 650
    assert {request.tenant for request in requests} == {f"tenant-{i}" for i in range(3)}


def test_memory_is_that_of_live_sessions() -> None:
    tracemalloc.start()
    count = sum(1 for _ in generate_trace("agents", num_requests=4_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4_000 and peak < 200_000


@pytest.mark.full
@pytest.mark.parametrize("workload", WORKLOADS)
def test_many_requests(workload: str) -> None:
    tracemalloc.start()
    count = sum(1 for _ in generate_trace(workload, num_requests=100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000 and peak < 16 << 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("session_rate", 0),
        ("turns", 0.5),
        ("tool_share", 1.1),
        ("output_spread", -1),
        ("max_context", 100),
        ("num_systems", 0),
        ("turn", 3),
    ],
)
def test_bad_knobs_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        generate_trace("chat", num_requests=1, **{name: value})
    assert caught.value.option == name


def test_bad_names_and_counts() -> None:
    with pytest.raises(ConfigError, match="choose one of chat, agents, rag, coding"):
        generate_trace("batch", num_requests=1)
    with pytest.raises(ConfigError, match="num_requests"):
        generate_trace("chat", num_requests=0)
