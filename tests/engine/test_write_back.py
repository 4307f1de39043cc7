"""What was computed reaches the tiers below before others take its place in the pool."""

from __future__ import annotations

from kv_run import BLOCK, KvRun, prompt_of


def test_what_the_last_step_computed_is_on_its_way_before_the_next_one_makes_room() -> None:
    """A large hit is admitted in the very step after a prompt has ended."""
    run = KvRun(num_blocks=40, cpu_blocks=200, prefetch_policy="none")
    large, small = prompt_of(1, 38 * BLOCK), prompt_of(2, 20 * BLOCK + 1)
    run.ask(large)
    for prompt in (small, large):
        run.add(prompt)
        run.finish()  # and nothing waits for what is on its way
    run.settle()
    run.ask(prompt_of(3, 38 * BLOCK))
    assert run.held(small) == {"gpu": 0, "cpu": 20}
