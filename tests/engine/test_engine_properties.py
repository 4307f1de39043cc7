"""Thousands of random operations on the whole decision engine; every law after every step."""

from __future__ import annotations

from histories import Run, operations, relaxed, requests
from hypothesis import given
from hypothesis import strategies as st

from tierkv.engine.plan import Plan
from tierkv.types import RowResult

NEWER = ["reuse", "session-protect", "workload-aware", "retention"]
engines = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(9, 60),
        "block_size": st.sampled_from([1, 2, 4, 8]),
        "window": st.sampled_from([None, None, 1, 5, 16]),
        "max_num_batched_tokens": st.sampled_from([4, 16, 64]),
        "max_num_seqs": st.sampled_from([4, 32]),
        "eviction_policy": st.sampled_from(
            ["lru", "fifo", "lfu", "sieve", "s3fifo", "arc", "tinylfu", "gdsf", *NEWER]
        ),
        "scheduling_policy": st.sampled_from(["fcfs", "priority", "lpm"]),
        "preemption_victim": st.sampled_from(["latest", "priority", "largest", "cheapest"]),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
    }
)


@relaxed
@given(engines, operations)
def test_any_history_gives_each_request_its_own_tokens_and_leaks_nothing(
    engine: dict[str, object], history: list[tuple[object, ...]]
) -> None:
    run = Run(engine)
    run.play(history)
    run.finish()


@relaxed
@given(engines, st.lists(requests, min_size=1, max_size=12), st.integers(0, 4))
def test_commit_may_lag_one_step_behind_plan(
    engine: dict[str, object], asked: list[tuple[int, int, list[int], int, int, int]], abort: int
) -> None:
    """Overlapped scheduling: step N+1 is planned before the tokens of step N are known."""
    run = Run(engine)
    for operation in asked:
        run.add(operation)
    scheduler = run.core.scheduler
    in_flight: tuple[Plan, list[RowResult]] | None = None
    for number in range(20_000):
        if number == abort:
            run.abort(abort)
        plan = scheduler.plan()
        launched = (plan, run.ledger.sample(run.ledger.run(plan), plan))
        if in_flight is not None:
            for output in scheduler.commit(*in_flight):
                run.got[output.request_id, output.index].extend(output.new_token_ids)
        in_flight = None if plan.is_empty else launched
        if in_flight is None and not run.core.has_work:
            break
    run.finish()
