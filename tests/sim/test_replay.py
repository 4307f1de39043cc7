"""Replays: the real engine in virtual time answers every request, whatever its options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

import tierkv.sim.replay as replay_module
from tierkv.sim.arrivals import BlockNames, with_following
from tierkv.sim.clock import VirtualClock
from tierkv.sim.generate import generate_trace
from tierkv.sim.hardware import load_hardware
from tierkv.sim.instant import Foreseen
from tierkv.sim.machine import Machine, build_world
from tierkv.sim.measures import Slo
from tierkv.sim.replay import Load, replay
from tierkv.sim.steps import ModelShape
from tierkv.sim.trace import Trace, TraceRequest
from tierkv.types import TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
SHAPE = ModelShape("tiny", 4, 4, 64, 10**9, 2 * 10**9, 1 << 20, 1 << 20)
HARDWARE = load_hardware("a100:drives=2")
TIERS = [{GPU: 400}, {GPU: 400, CPU: 900}, {GPU: 400, NVME: 1500}, {GPU: 400, CPU: 600, NVME: 1500}]


def machine(blocks: dict[TierName, int], size: int = 16, **options: Any) -> Machine:
    return Machine(SHAPE, HARDWARE, size, blocks, options)


def agents(count: int = 60, seed: int = 0) -> Trace:
    return generate_trace("agents", num_requests=count, seed=seed, max_context=4000)


def one_by_one(requests: list[TraceRequest], size: int = 16) -> Trace:
    return Trace("given", size, lambda: iter(requests))


@pytest.mark.parametrize("blocks", TIERS, ids=lambda b: "+".join(t.value for t in b))
@pytest.mark.parametrize("eviction", ["lru", "s3fifo", "reuse"])
def test_every_request_ends_whatever_the_tiers(blocks: dict[TierName, int], eviction: str) -> None:
    found = replay(agents(), machine(blocks, eviction_policy=eviction))
    assert found.num_requests + found.num_excluded == 60
    fitting = [r for r in agents() if r.input_tokens + r.output_tokens <= 400 * 16 + 1]
    assert found.counters["generated_tokens"] == sum(r.output_tokens for r in fitting)
    assert 0 < found.hit_rate <= 1
    parts = found.hit_rate_gpu + found.hit_rate_cpu + found.hit_rate_nvme
    assert found.hit_rate == pytest.approx(parts)
    assert (found.promoted_bytes > 0) == (len(blocks) > 1)


@pytest.mark.parametrize("mode", ["recompute", "swap", "auto"])
def test_preempted_requests_end_too(mode: str) -> None:
    requests = [TraceRequest(0.0, 64, 600, ((1000 * i, 4),)) for i in range(6)]
    trace = one_by_one(requests)
    found = replay(trace, machine({GPU: 60, CPU: 200}, preemption_mode=mode))
    assert found.num_requests == 6
    assert found.preemptions > 0
    assert found.counters["generated_tokens"] == 6 * 600


def test_a_world_keeps_its_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = {GPU: 400, CPU: 300, NVME: 500}
    world = build_world(machine(tiers), BlockNames(16))
    step = world.core.step
    times: list[float] = []

    def checked_step() -> Any:
        outputs = step()
        times.append(world.clock.now())
        if len(times) % 8 == 0:
            world.core.check()
        return outputs

    monkeypatch.setattr(world.core, "step", checked_step)
    monkeypatch.setattr(replay_module, "build_world", lambda *_: world)
    assert replay(agents(25), machine(tiers)).num_requests == 25
    assert len(times) > 100 and times == sorted(times)


def test_the_same_trace_gives_the_same_numbers() -> None:
    blocks = {GPU: 400, CPU: 600, NVME: 900}
    first, again = (
        json.dumps(replay(agents(), machine(blocks)).as_dict(), sort_keys=True) for _ in range(2)
    )
    assert first == again


def test_everything_is_hit_where_everything_fits() -> None:
    trace = agents(80)
    found = replay(trace, machine({GPU: 60_000}), Load(reuses_outputs=False))
    assert found.hit_rate == pytest.approx(Foreseen.of(trace).infinite().rate, abs=0.01)


def test_answers_come_back_in_the_next_prompt() -> None:
    first = TraceRequest(0.0, 32, 64, ((10, 2),), session="s", turn=1)
    second = TraceRequest(1.0, 128, 4, ((10, 8),), session="s", turn=2)
    trace = one_by_one([first, second])
    shared = replay(trace, machine({GPU: 100}))
    assert shared.counters["hit_tokens"] == 80  # the last token of the answer was not computed
    alone = replay(trace, machine({GPU: 100}), Load(reuses_outputs=False))
    assert alone.counters["hit_tokens"] == 32


def test_a_turn_waits_for_the_answer_before_it() -> None:
    requests = [TraceRequest(0.0, 16, 50, ((1, 1),), "s", n) for n in (1, 2, 3)]
    waits = replay(one_by_one(requests), machine({GPU: 100}))
    at_once = replay(
        one_by_one([dataclasses.replace(r, session="") for r in requests]), machine({GPU: 100})
    )
    assert waits.duration_s > 2.5 * at_once.duration_s
    assert waits.ttft_s["p99"] < at_once.duration_s  # it counts from when the client could ask


def test_requests_that_are_too_long_are_left_out_and_counted() -> None:
    requests = [TraceRequest(0.0, length, 8, ((0, length // 16),)) for length in (100, 2000, 300)]
    found = replay(one_by_one(requests), machine({GPU: 50}))
    assert (found.num_requests, found.num_excluded) == (2, 1)
    found = replay(one_by_one(requests), machine({GPU: 500}), Load(max_tokens=120))
    assert (found.num_requests, found.num_excluded) == (1, 2)


def test_a_faster_trace_is_a_heavier_load() -> None:
    trace = agents(60)
    slow, fast = (replay(trace, machine({GPU: 400}), Load(rate=rate)) for rate in (0.2, 500.0))
    assert fast.duration_s < slow.duration_s
    assert fast.ttft_s["p99"] > slow.ttft_s["p99"]
    assert fast.busy_share > slow.busy_share


def test_what_is_good_depends_on_the_slo() -> None:
    strict = replay(agents(), machine({GPU: 400}), slo=Slo(1e-6, 1e-6))
    easy = replay(agents(), machine({GPU: 400}), slo=Slo(1e6, 1e6))
    assert (strict.goodput, strict.good_share) == (0.0, 0.0)
    assert easy.good_share == 1.0 and easy.goodput == pytest.approx(easy.requests_per_s)


def test_progress_counts_the_requests() -> None:
    told: list[int] = []
    replay(agents(30), machine({GPU: 400}), progress=told.append)
    assert told == list(range(1, 31))


def test_a_trace_without_anything_ends() -> None:
    found = replay(one_by_one([]), machine({GPU: 10}))
    assert (found.num_requests, found.hit_rate, found.goodput) == (0, 0.0, 0.0)


def test_following_requests_are_those_of_the_session() -> None:
    def requests() -> Iterator[TraceRequest]:
        for i in range(10_000):
            yield TraceRequest(float(i), 1, 1, session=str(i % 3) if i < 5000 else "")

    found = list(with_following(requests()))
    assert [a.number for a in found] == list(range(10_000))
    for arrival in found[:4990]:
        assert arrival.following is found[arrival.number + 3].request
    assert all(arrival.following is None for arrival in found[5000:])


@pytest.mark.parametrize("size", [1, 2, 16])
def test_tokens_spell_the_ids_of_blocks(size: int) -> None:
    names = BlockNames(size)
    request = TraceRequest(0.0, 5 * size + size // 2, 3 * size, ((1 << 40, 3), (7, 2)))
    (arrival,) = with_following([request])
    ids = names.ids_of(arrival)
    assert ids[:5] == request.block_ids() and len(set(ids)) == len(ids)
    tokens = names.prompt_of(ids, request.input_tokens)
    assert len(tokens) == request.input_tokens
    for position, token in enumerate(tokens):
        assert token == names.token_at(ids, position)
        assert 0 <= token < 1 << 32


def test_time_does_not_go_back() -> None:
    clock = VirtualClock(5.0)
    clock.advance_to(3.0)
    assert clock.now() == 5.0


def test_what_is_prefetched_is_there_when_its_turn_comes() -> None:
    found = replay(agents(80), machine({GPU: 400, CPU: 4000}), Load(rate=30.0))
    assert found.prefetch_useful > 200
    assert found.prefetch_wasted < 0.25 * found.prefetch_useful
