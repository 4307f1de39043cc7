"""Thousands of random operations on the whole decision engine; every law after every step."""

from __future__ import annotations

from histories import Run, operations, relaxed
from hypothesis import given
from hypothesis import strategies as st

NEWER = ["reuse", "session-protect", "workload-aware", "retention"]
engines = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(9, 60),
        "block_size": st.sampled_from([1, 2, 4, 8]),
        "window": st.sampled_from([None, None, 1, 5, 16]),
        "max_num_batched_tokens": st.sampled_from([4, 16, 64]),
        "max_num_seqs": st.sampled_from([4, 32]),
        "async_scheduling": st.booleans(),
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
