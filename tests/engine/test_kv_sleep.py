"""Sleep: nothing runs, the pool is empty, and afterwards everything goes on as if nothing was."""

from __future__ import annotations

import pytest
from kv_run import BLOCK, KvRun, prompt_of

from tierkv.engine.sleep import SleepState

TIERS = [{}, {"cpu_blocks": 100}, {"nvme_blocks": 100}, {"cpu_blocks": 12, "nvme_blocks": 100}]


def fall_asleep(run: KvRun) -> None:
    run.control.sleep()
    for _ in range(200):
        if run.control.sleeper.state is SleepState.ASLEEP:
            break
        run.core.work_in_background()
        run.core.check()
    assert run.control.sleep_state()["state"] == "asleep"
    assert run.cache.num_empty == run.cache.num_blocks
    assert all(row == [None] * BLOCK for row in run.ledger.pool)
    assert not run.core.has_background_work


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_sleep_under_load_changes_no_token(tiers: dict[str, int], steps: int) -> None:
    run = KvRun(num_blocks=40, max_num_batched_tokens=16, **tiers)
    names = [run.add(prompt_of(i, 10 + 3 * i), tokens=12) for i in range(6)]
    for _ in range(steps):
        run.step()
    fall_asleep(run)
    late = run.add(prompt_of(9, 9), tokens=5)
    for _ in range(5):
        run.step()  # nothing happens
    assert not run.core.has_work
    assert run.control.wake()["state"] == "awake"
    run.finish()
    assert [len(run.got[name]) for name in names] == [12] * 6
    assert len(run.got[late]) == 5


@pytest.mark.parametrize("tiers", TIERS[1:])
def test_what_was_in_the_pool_is_below(tiers: dict[str, int]) -> None:
    run = KvRun(num_blocks=60, admission_policy="write-back", **tiers)
    prompts = [prompt_of(i, 4 * BLOCK) for i in range(8)]
    for prompt in prompts:
        run.ask(prompt)
    fall_asleep(run)
    assert [run.control.where("", prompt)["cached_tokens"] for prompt in prompts] == [16] * 8
    run.control.wake()
    for prompt in prompts:
        assert run.ask(prompt) >= 3 * BLOCK


def test_a_write_rate_does_not_lose_what_goes_to_sleep() -> None:
    run = KvRun(num_blocks=60, nvme_blocks=100, nvme_write_rate=1)
    for number in range(5):
        run.ask(prompt_of(number, 4 * BLOCK))
    fall_asleep(run)
    assert sum(run.held(prompt_of(i, 16))["nvme"] for i in range(5)) == 20


def test_what_no_tier_has_room_for_is_computed_again() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=6)
    names = [run.add(prompt_of(i, 20), tokens=9) for i in range(4)]
    for _ in range(4):
        run.step()
    fall_asleep(run)
    run.control.wake()
    run.finish()
    assert [len(run.got[name]) for name in names] == [9] * 4


def test_sleep_waits_for_moves_and_may_be_called_off() -> None:
    slow = {"is_eager": False, "is_ordered": True, "seed": 3}
    run = KvRun(num_blocks=40, cpu_blocks=100, mover=slow)
    names = [run.add(prompt_of(i, 20), tokens=9) for i in range(4)]
    for _ in range(4):
        run.step()
    run.control.sleep()
    assert run.control.sleep_state() == {"state": "falling asleep", "bytes_given_back": 0}
    assert run.core.has_background_work and not run.core.has_work
    run.control.wake()
    run.finish()
    assert [len(run.got[name]) for name in names] == [9] * 4


def test_requests_can_be_aborted_while_it_sleeps() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40)
    names = [run.add(prompt_of(i, 12), tokens=9) for i in range(2)]
    for _ in range(3):
        run.step()
    fall_asleep(run)
    run.core.abort([names[0]])
    assert run.core.has_work
    (output,) = run.core.step()
    assert output.finish_reason is not None and output.request_id == names[0]
    assert not run.core.has_work
    run.control.wake()
    run.finish()
    assert len(run.got[names[1]]) == 9


def test_sleeping_twice_is_sleeping() -> None:
    run = KvRun(num_blocks=40, cpu_blocks=40)
    run.ask(prompt_of(1, 12))
    fall_asleep(run)
    fall_asleep(run)
    assert run.control.sleep_state()["bytes_given_back"] == 40 * run.core.info.block_bytes
    run.control.wake()
    run.control.wake()
    assert run.ask(prompt_of(1, 12)) > 0


def test_what_loads_when_sleep_comes_is_loaded_later() -> None:
    slow = {"is_eager": False, "is_ordered": True, "seed": 5}
    run = KvRun(num_blocks=16, cpu_blocks=100, mover=slow)
    prompt = prompt_of(1, 8 * BLOCK)
    run.ask(prompt)
    run.ask(prompt_of(2, 14 * BLOCK))  # pushes it out of the pool
    name = run.add([*prompt, 1], tokens=4)
    for _ in range(50):
        run.step()
        if run.core.scheduler.loading:
            break
    assert run.core.scheduler.loading
    fall_asleep(run)
    run.control.wake()
    run.finish()
    assert len(run.got[name]) == 4


@pytest.mark.parametrize("tiers", [{}, {"cpu_blocks": 60}])
def test_parallel_samples_and_windows_sleep_too(tiers: dict[str, int]) -> None:
    from ledger import expected_tokens

    from tierkv.engine.core import EngineRequest
    from tierkv.engine.sampling_params import SamplingParams

    for window in (None, 7):
        run = KvRun(num_blocks=40, window=window, **tiers)
        prompt, got = prompt_of(4, 11), {}
        params = SamplingParams(n=3, max_tokens=8)
        run.core.add_request(EngineRequest("n", prompt, params))
        for _ in range(4):
            for output in run.core.step():
                got.setdefault(output.index, []).extend(output.new_token_ids)
        fall_asleep(run)
        run.control.wake()
        while run.core.has_work:
            for output in run.core.step():
                got.setdefault(output.index, []).extend(output.new_token_ids)
            run.core.check()
        assert got == {i: expected_tokens(prompt, 8, i) for i in range(3)}
