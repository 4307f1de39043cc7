"""Studies: cross products, sizes of tiers, the gap that a policy closes; advice."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.errors import ConfigError
from tierkv.sim.advise import advice, combination, compare, single_changes
from tierkv.sim.cases import Choices, make_cases
from tierkv.sim.coarsen import coarsen
from tierkv.sim.hardware import load_hardware
from tierkv.sim.machine import Machine
from tierkv.sim.measures import Measures
from tierkv.sim.replay import Load
from tierkv.sim.sizes import Units, auto_gpu_blocks, parse_tiers
from tierkv.sim.source import Source
from tierkv.sim.steps import ModelShape
from tierkv.sim.study import Case, Outcome, Study, run_study, same_requests
from tierkv.sim.trace import Run, Trace, TraceRequest
from tierkv.types import TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
SHAPE = ModelShape("tiny", 4, 4, 64, 10**9, 2 * 10**9, 1 << 20, 1 << 20)
HARDWARE = load_hardware("a100")
UNITS = Units(slot_bytes=1 << 20, unique_blocks=2000, gpu_blocks=300)
SOURCE = Source("agents", limit=60, knobs=(("max_context", 4000),))


def cases(choices: Choices, **fixed: Any) -> list[Case]:
    return make_cases(SHAPE, HARDWARE, 16, choices, fixed, Load())


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", {GPU: 300}),
        ("gpu=auto", {GPU: 300}),
        ("nvme=1GiB,gpu=5%", {GPU: 100, NVME: 1024}),
        ("gpu=70blocks, cpu=64MiB, nvme=0", {GPU: 70, CPU: 64}),
        ("cpu=10%", {GPU: 300, CPU: 200}),
    ],
)
def test_sizes(text: str, blocks: dict[TierName, int]) -> None:
    assert parse_tiers(text, UNITS) == blocks


@pytest.mark.parametrize(
    "text", ["hbm=1GiB", "gpu=1GiB,gpu=2GiB", "gpu=0", "cpu", "gpu=x%", "gpu=-1%"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="tiers"):
        parse_tiers(text, UNITS)


def test_a_model_that_does_not_fit_is_refused() -> None:
    big = dataclasses.replace(SHAPE, weight_bytes=10**12)
    with pytest.raises(ConfigError, match="take more devices"):
        auto_gpu_blocks(big, HARDWARE, 16)
    unknown = dataclasses.replace(HARDWARE, memory=0)
    assert auto_gpu_blocks(SHAPE, unknown, 16) is None
    with pytest.raises(ConfigError, match="gpu="):
        parse_tiers("gpu=auto", dataclasses.replace(UNITS, gpu_blocks=None))


def test_all_combinations_are_named_by_what_differs() -> None:
    choices = Choices(
        [("small", {GPU: 10}), ("large", {GPU: 20, NVME: 50})],
        {"eviction_policy": ["lru", "sieve"], "load_policy": ["load"]},
        rates=(1.0, 2.0),
        baselines=["vllm"],
    )
    found = cases(choices, max_num_seqs=7)
    names = [case.name for case in found]
    assert len(found) == 2 * 2 * (2 + 1) and len(set(names)) == len(names)
    assert "eviction_policy=sieve tiers=large rate=2" in names
    vllm = next(case for case in found if case.name == "baseline=vllm tiers=large rate=1")
    assert vllm.machine.blocks == {GPU: 20}
    assert vllm.machine.options["admission_policy"] == "prompt-only"
    assert all(case.machine.options["max_num_seqs"] == 7 for case in found)


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        cases(Choices([("a", {GPU: 1})], baselines=["other"]))


def test_all_cases_see_the_same_requests() -> None:
    found = same_requests(cases(Choices([("a", {GPU: 10}), ("b", {GPU: 20})])))
    assert {case.load.max_tokens for case in found} == {161}


def test_processes_change_no_result() -> None:
    tiers = [("a", {GPU: 300}), ("b", {GPU: 300, CPU: 500})]
    study = Study(SOURCE, cases(Choices(tiers, {"eviction_policy": ["lru", "fifo"]})))
    told: list[int] = []
    alone = run_study(study, jobs=1)
    together = run_study(study, jobs=2, progress=told.append)
    assert [o.as_dict() for o in alone] == [o.as_dict() for o in together]
    assert told and min(told) > 0
    lru = alone[0]
    assert lru.gap_closed == 0.0 and lru.optimum_hit_rate is not None
    assert lru.optimum_hit_rate > lru.measures.hit_rate


def test_a_study_of_no_requests_says_what_they_are_too_long_for() -> None:
    small = Study(SOURCE, cases(Choices([("a", {GPU: 300}), ("b", {GPU: 3})])))
    with pytest.raises(ConfigError, match=r"gpu=3blocks.*none of the 60 requests fits into 49 tok"):
        run_study(small, jobs=1)
    short = Study(
        SOURCE,
        make_cases(SHAPE, HARDWARE, 16, Choices([("a", {GPU: 300})]), {}, Load(max_tokens=7)),
    )
    with pytest.raises(ConfigError, match=r"tiny.*into 7 tokens.*--no-context-limit"):
        run_study(short, jobs=1)


def test_an_error_in_a_process_is_the_users() -> None:
    study = Study(SOURCE, cases(Choices([("a", {GPU: 50})], {"eviction_policy": ["lru", "none"]})))
    with pytest.raises(ConfigError, match="eviction_policy"):
        run_study(study, jobs=2)


runs = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 40)), max_size=6)


@given(runs, st.integers(1, 8))
def test_larger_blocks_have_the_ids_of_their_last(found: list[Run], factor: int) -> None:
    request = TraceRequest(0.0, 10**6, 1, tuple(found))
    coarse = list(coarsen(Trace("t", 16, lambda: iter([request])), 16 * factor))
    assert coarse[0].block_ids() == request.block_ids()[factor - 1 :: factor]


def test_blocks_cannot_become_smaller() -> None:
    with pytest.raises(ConfigError, match="coarsen=24: must be a multiple"):
        coarsen(Trace("t", 16, lambda: iter([])), 24)


# ---------------------------------------------------------------------- advice


def outcome(goodput: float, ttft_s: float, written: int = 0, **options: Any) -> Outcome:
    blocks = options.pop("blocks", {GPU: 10, CPU: 20})
    case = Case({"change": str(options)}, Machine(SHAPE, HARDWARE, 16, blocks, options), Load())
    measures = Measures(goodput=goodput, ttft_s={"mean": ttft_s}, nvme_written_bytes=written)
    return Outcome(case, measures)


def test_every_single_change_is_tried() -> None:
    machine = Machine(SHAPE, HARDWARE, 16, {GPU: 10, CPU: 20, NVME: 30})
    found = single_changes(machine, Load(), {"eviction_policy": "lru"} | OTHERS)
    names = [case.name for case in found]
    assert names[:3] == ["change=defaults", "change=no cpu, no nvme", "change=no nvme"]
    assert "change=eviction_policy=lru" not in names
    assert "change=eviction_policy=s3fifo" in names and "change=load_policy=load" in names
    alone = single_changes(Machine(SHAPE, HARDWARE, 16, {GPU: 10}), Load(), OTHERS)
    assert not [case for case in alone if "load_policy" in case.name]


OTHERS = {
    "eviction_policy": "lru",
    "admission_policy": "write-through",
    "prefetch_policy": "lookahead",
    "load_policy": "auto",
    "preemption_mode": "auto",
    "scheduling_policy": "fcfs",
}


def test_what_helped_is_combined() -> None:
    tried = [
        outcome(1.0, 5.0),
        outcome(2.0, 5.0, eviction_policy="sieve"),
        outcome(3.0, 5.0, eviction_policy="s3fifo"),
        outcome(0.5, 5.0, load_policy="recompute"),
        outcome(1.5, 5.0, prefetch_policy="none"),
    ]
    found = combination(tried)
    assert found is not None
    assert found.machine.options == {"eviction_policy": "s3fifo", "prefetch_policy": "none"}
    assert combination(tried[:2]) is None
    best = advice(tried)
    assert (best.best, best.runner_up, best.base) == (tried[2], tried[1], tried[0])


def test_equals_are_told_apart_by_time_then_by_wear() -> None:
    assert compare(outcome(1.0, 2.0), outcome(1.001, 3.0)) < 0
    assert compare(outcome(1.0, 2.0), outcome(0.5, 1.0)) < 0
    assert compare(outcome(1.0, 2.0, 10), outcome(1.0, 2.0, 20)) < 0
    assert compare(outcome(1.0, 2.0), outcome(1.0, 2.0)) == 0


def test_sampling_is_seeded() -> None:
    seeds = random.Random(0).sample(range(100), 2)
    first, second = (list(dataclasses.replace(SOURCE, seed=seed).open()) for seed in seeds)
    assert first != second and first == list(dataclasses.replace(SOURCE, seed=seeds[0]).open())
