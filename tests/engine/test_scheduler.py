"""The scheduler on a ledger: every plan reads right KV, every sequence gets its own tokens."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from ledger import expected_tokens, ledger_engine

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import CapacityError, EngineDeadError, RequestError
from tierkv.types import FinishReason


def add(
    core: EngineCore, name: str, prompt: list[int], max_tokens: int = 5, n: int = 1, **kw: object
) -> None:
    params = SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True)
    core.add_request(EngineRequest(name, prompt, params, **kw))  # type: ignore[arg-type]


def drain(core: EngineCore, limit: int = 5_000) -> dict[tuple[str, int], list[int]]:
    """Run to the end, laws checked after every step; generated tokens by request and sample."""
    tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
    for _ in range(limit):
        if not core.has_work:
            return tokens
        for output in core.step():
            tokens[output.request_id, output.index].extend(output.new_token_ids)
        core.check()
    raise AssertionError("the engine did not come to an end")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(50), k=length)


def test_one_request() -> None:
    core, _, _ = ledger_engine()
    add(core, "a", prompt_of(10), 7)
    assert drain(core) == {("a", 0): expected_tokens(prompt_of(10), 7)}
    assert core.metrics()["gpu_blocks_used"] == 0


def test_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    core, ledger, _ = ledger_engine(num_blocks=100, max_num_batched_tokens=16)
    add(core, "short", prompt_of(5, 1), 30)
    core.step()
    add(core, "long", prompt_of(100, 2), 3)
    outputs = core.step()
    assert [o.request_id for o in outputs] == ["short"]
    assert ledger.computed[-2:] == [(0, 5, 1), (1, 0, 15)]
    tokens = drain(core)
    assert tokens["long", 0] == expected_tokens(prompt_of(100, 2), 3)


def test_prefix_is_reused_to_the_token() -> None:
    core, ledger, _ = ledger_engine(block_size=8)
    base = prompt_of(30)
    add(core, "a", base, 1)
    drain(core)
    add(core, "b", [*base[:21], 1, 2, 3], 4)  # 2 full blocks and 5 tokens of the third
    first = len(ledger.computed)
    assert drain(core)["b", 0] == expected_tokens([*base[:21], 1, 2, 3], 4)
    assert ledger.computed[first][1:] == (21, 3)
    assert ledger.num_copies == 1
    assert core.metrics()["hit_tokens"] == 21


def test_whole_prompt_cached_leaves_one_token_to_compute() -> None:
    core, ledger, _ = ledger_engine(block_size=4)
    add(core, "a", prompt_of(16), 1)
    drain(core)
    add(core, "b", prompt_of(16), 2)
    first = len(ledger.computed)
    drain(core)
    assert ledger.computed[first][1:] == (15, 1)


def test_cache_salt_separates() -> None:
    core, _, _ = ledger_engine()
    add(core, "a", prompt_of(40), 1)
    drain(core)
    add(core, "b", prompt_of(40), 1, cache_salt="other")
    drain(core)
    assert core.metrics()["hit_tokens"] == 0
    add(core, "c", prompt_of(40), 1, cache_salt="other")
    drain(core)
    assert core.metrics()["hit_tokens"] == 39


def test_same_prefix_is_computed_once_when_requests_arrive_together() -> None:
    core, ledger, _ = ledger_engine(num_blocks=200, max_num_batched_tokens=32)
    shared = prompt_of(64)
    for i in range(6):
        add(core, f"r{i}", [*shared, i, i + 1], 3)
    tokens = drain(core)
    for i in range(6):
        assert tokens[f"r{i}", 0] == expected_tokens([*shared, i, i + 1], 3)
    assert sum(n for _, _, n in ledger.computed) < 66 + 6 * 2 + 6 * 3
    assert core.metrics()["hit_tokens"] == 5 * 64


def test_waiters_go_on_when_the_owner_of_their_prefix_is_aborted() -> None:
    core, _, _ = ledger_engine(num_blocks=200, max_num_batched_tokens=16)
    shared = prompt_of(64)
    add(core, "owner", [*shared, 1], 3)
    add(core, "waiter", [*shared, 2], 3)
    core.step()
    core.abort(["owner"])
    assert drain(core)["waiter", 0] == expected_tokens([*shared, 2], 3)


@pytest.mark.parametrize("victim", ["latest", "priority", "largest"])
@pytest.mark.parametrize("order", ["fcfs", "priority", "lpm"])
@pytest.mark.parametrize("eviction", ["lru", "fifo", "lfu"])
def test_small_pool_preempts_and_changes_no_token(victim: str, order: str, eviction: str) -> None:
    core, _, _ = ledger_engine(
        num_blocks=14,
        preemption_victim=victim,
        scheduling_policy=order,
        eviction_policy=eviction,
    )
    prompts = {f"r{i}": prompt_of(6 + i, i) for i in range(5)}
    for i, (name, prompt) in enumerate(prompts.items()):
        add(core, name, prompt, 20, priority=i % 3)
    tokens = drain(core)
    for name, prompt in prompts.items():
        assert tokens[name, 0] == expected_tokens(prompt, 20)
    assert core.metrics()["preemptions"] > 0


def test_priority_and_lpm_order_admission() -> None:
    core, ledger, _ = ledger_engine(max_num_seqs=1, scheduling_policy="priority")
    for i, priority in enumerate((5, 1, 3)):
        add(core, f"r{i}", prompt_of(4, i), 2, priority=priority)
    drain(core)
    assert [s for s, start, _ in ledger.computed if start == 0] == [1, 2, 0]

    core, ledger, _ = ledger_engine(max_num_seqs=1, scheduling_policy="lpm")
    add(core, "warm", prompt_of(24, 9), 1)
    drain(core)
    add(core, "cold", prompt_of(24, 1), 1)
    add(core, "hot", [*prompt_of(24, 9), 3], 1)
    drain(core)
    assert [s for s, _, _ in ledger.computed] == [0, 2, 1]


def test_parallel_samples_share_blocks_and_copy_on_write() -> None:
    core, ledger, _ = ledger_engine(block_size=8)
    add(core, "a", prompt_of(21), 12, n=4)
    first = [o.new_token_ids for o in core.step()]
    assert core.metrics()["gpu_blocks_used"] == 3
    tokens = drain(core)
    expected = [expected_tokens(prompt_of(21), 12, i) for i in range(4)]
    assert first == [tokens[:1] for tokens in expected]
    expected = [tokens[1:] for tokens in expected]
    assert [tokens["a", i] for i in range(4)] == expected
    assert ledger.num_copies == 3  # the last holder writes in place


def test_parallel_samples_survive_preemption() -> None:
    core, _, _ = ledger_engine(num_blocks=12, block_size=4)
    add(core, "a", prompt_of(10), 20, n=3)
    add(core, "b", prompt_of(9, 3), 12, n=2)
    tokens = drain(core)
    for i in range(3):
        assert tokens["a", i] == expected_tokens(prompt_of(10), 20, i)
    for i in range(2):
        assert tokens["b", i] == expected_tokens(prompt_of(9, 3), 12, i)
    assert core.metrics()["preemptions"] > 0


def test_request_that_never_fits_is_refused_and_one_that_fits_alone_runs() -> None:
    core, _, _ = ledger_engine(num_blocks=8, block_size=4)
    with pytest.raises(CapacityError, match=r"need 9 KV blocks of 4 tokens, the pool has 8"):
        add(core, "big", prompt_of(23), 11)
    for i in range(3):
        add(core, f"r{i}", prompt_of(23, i), 10)
    tokens = drain(core)
    for i in range(3):
        assert tokens[f"r{i}", 0] == expected_tokens(prompt_of(23, i), 10)


def test_exact_fit_with_a_cached_partial_block_is_not_stuck() -> None:
    core, _, _ = ledger_engine(num_blocks=8, block_size=4)
    add(core, "a", prompt_of(31), 1)
    drain(core)
    other = prompt_of(31)[:6] + prompt_of(25, 5)
    add(core, "b", other, 2)
    assert drain(core)["b", 0] == expected_tokens(other, 2)


def test_bad_requests_change_nothing() -> None:
    core, _, _ = ledger_engine(num_blocks=8, block_size=4, max_model_len=30, max_num_seqs=4)
    for prompt, field in (([], "prompt"), ([50], "prompt_token_ids"), ([1] * 30, "prompt")):
        with pytest.raises(RequestError) as caught:
            add(core, "bad", prompt)
        assert caught.value.field == field
    with pytest.raises(RequestError, match="n=5"):
        add(core, "bad", [1], n=5)
    add(core, "good", [1, 2], 3)
    with pytest.raises(RequestError, match="in use"):
        add(core, "good", [1])
    assert drain(core)["good", 0] == expected_tokens([1, 2], 3)


def test_abort_frees_at_once_and_reports() -> None:
    core, _, _ = ledger_engine()
    add(core, "a", prompt_of(20), 50, n=2)
    add(core, "b", prompt_of(20, 1), 50)
    core.step()
    core.abort(["a", "unknown"])
    core.check()
    outputs = core.step()
    ended = [(o.index, o.finish_reason) for o in outputs if o.request_id == "a"]
    assert ended == [(0, FinishReason.ABORT), (1, FinishReason.ABORT)]
    core.abort(["b"])
    assert core.metrics()["gpu_blocks_used"] == 0


def test_stop_sequence_ends_one_sample_silently() -> None:
    core, ledger, _ = ledger_engine()
    add(core, "a", prompt_of(6), 9, n=2)
    core.step()
    core.stop_sequence("a", 0)
    tokens = drain(core)
    assert ("a", 0) not in tokens
    assert tokens["a", 1] == expected_tokens(prompt_of(6), 9, 1)[1:]
    assert sorted(set(ledger.forgotten)) == [0, 1]


def test_stop_tokens_and_min_tokens() -> None:
    expected = expected_tokens(prompt_of(6), 9)
    core, _, _ = ledger_engine()
    params = SamplingParams(max_tokens=9, stop_token_ids=[expected[2]])
    core.add_request(EngineRequest("a", prompt_of(6), params))
    outputs = []
    while core.has_work:
        outputs.extend(core.step())
    first = expected.index(expected[2])
    assert [t for o in outputs for t in o.new_token_ids] == expected[: first + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_reason == expected[2]


def test_stepped_request_forks_and_advances() -> None:
    core, _, _ = ledger_engine()
    params = SamplingParams(max_tokens=20, logprobs=4)
    core.add_request(EngineRequest("beam", prompt_of(7), params, is_stepped=True))
    (first,) = core.step()
    assert first.new_token_ids == [] and first.logprobs is not None
    assert not core.has_work
    child = core.fork(first.seq_id, 11)
    core.advance(first.seq_id, 12)
    core.check()
    ids = {o.seq_id for o in core.step()}
    assert ids == {first.seq_id, child}
    core.drop(child)
    core.check()
    with pytest.raises(RequestError):
        core.advance(child, 1)
    core.drop(first.seq_id)
    assert core.metrics()["gpu_blocks_used"] == 0 and not core.scheduler.requests


def test_beams_that_do_not_fit_together_take_turns() -> None:
    core, _, _ = ledger_engine(num_blocks=6, block_size=4)
    params = SamplingParams(max_tokens=12, logprobs=4)
    core.add_request(EngineRequest("beam", prompt_of(7), params, is_stepped=True))
    (first,) = core.step()
    beams = {first.seq_id, core.fork(first.seq_id, 11), core.fork(first.seq_id, 12)}
    core.advance(first.seq_id, 13)
    for token in range(20, 30):
        heard: set[int] = set()
        for _ in range(40):
            if core.has_work:
                heard |= {o.seq_id for o in core.step()}
                core.check()
        assert heard == beams
        for seq_id in beams:
            core.advance(seq_id, token)
    core.abort(["beam"])
    assert core.metrics()["gpu_blocks_used"] == 0


def test_window_frees_blocks_behind_it_and_still_reuses() -> None:
    core, _, _ = ledger_engine(num_blocks=12, block_size=4, window=8, max_num_batched_tokens=16)
    add(core, "a", prompt_of(120), 40)  # 160 tokens through a pool of 48
    used = 0
    tokens: list[int] = []
    while core.has_work:
        tokens += [t for o in core.step() for t in o.new_token_ids]
        core.check()
        used = max(used, core.metrics()["gpu_blocks_used"])
    assert tokens == expected_tokens(prompt_of(120), 40)
    assert used <= 8
    add(core, "b", [*prompt_of(120), *tokens[:30]], 4)
    drain(core)
    assert core.metrics()["hit_tokens"] > 100


def test_a_failed_step_ends_the_engine_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan was made and never committed: going on would serve wrong KV."""
    core, ledger, _ = ledger_engine()
    add(core, "a", prompt_of(6), 9)
    core.step()
    with monkeypatch.context() as broken:
        broken.setattr(ledger, "run", lambda plan: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            core.step()
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        core.step()
    core.abort(["a"])
    assert core.metrics()["gpu_blocks_used"] == 0


def test_reset_prefix_cache() -> None:
    core, _, _ = ledger_engine()
    add(core, "a", prompt_of(30), 4)
    core.step()
    assert not core.reset_prefix_cache()
    drain(core)
    assert core.reset_prefix_cache()
    core.check()
    assert core.metrics()["gpu_blocks_cached"] == 0
    assert len(core.cache.tree) == 0 and core.cache.tree.roots == []


def test_caching_off_reuses_nothing() -> None:
    core, _, _ = ledger_engine(enable_prefix_caching=False)
    for name in ("a", "b"):
        add(core, name, prompt_of(30), 4)
        drain(core)
    metrics = core.metrics()
    assert metrics["hit_tokens"] == 0 and metrics["gpu_blocks_cached"] == 0


def test_a_tail_that_its_parent_has_filled_is_copied() -> None:
    """With overlapped steps a parent writes into the block that its sample will share, and may
    publish it before the sample goes on."""
    core, ledger, _ = ledger_engine(block_size=4)
    prompt = list(range(15))
    core.add_request(EngineRequest("r", prompt, SamplingParams(max_tokens=9, n=2)))
    launched = []
    for _ in range(2):  # the parent's sixteenth token fills the block
        plan = core.scheduler.plan()
        logits = ledger.run(plan)
        core.scheduler.note_launched()
        launched.append((plan, ledger.draw(logits, plan).results()))
    for plan, results in launched:
        core.scheduler.commit(plan, results)
    parent, child = core.scheduler.requests["r"].sequences
    tail = child.blocks[-1]
    assert tail is parent.blocks[3] and tail is not None and tail.in_tree
    core.scheduler.finish_sequence(parent, FinishReason.ABORT)
    core.step()
    assert child.blocks[3] is not tail
    core.check()
    again = [*prompt, *expected_tokens(prompt, 1)]
    core.add_request(EngineRequest("again", [*again, 7], SamplingParams(max_tokens=3)))
    found: list[int] = []
    while core.has_work:
        found += [t for o in core.step() if o.request_id == "again" for t in o.new_token_ids]
    assert found == expected_tokens([*again, 7], 3)


def test_a_sequence_that_was_stopped_says_nothing_more() -> None:
    """Also where its next token has been read already, for a call between two steps."""
    core, _, _ = ledger_engine(async_scheduling=True)
    add(core, "stopped", prompt_of(9, 1), 30)
    add(core, "other", prompt_of(9, 2), 30)
    for _ in range(4):
        core.step()
    assert core.steps.is_busy and not core.reset_prefix_cache()
    core.stop_sequence("stopped", 0)
    assert [output.request_id for output in core.step()] == ["other"]


def test_of_an_aborted_request_only_its_end_is_said() -> None:
    """Not what its caller could choose from, which has been read already."""
    core, _, _ = ledger_engine(async_scheduling=True)
    params = SamplingParams(max_tokens=5, logprobs=4)
    core.add_request(EngineRequest("search", prompt_of(9), params, is_stepped=True))
    core.step()
    assert core.steps.is_busy and not core.reset_prefix_cache()
    core.abort(["search"])
    assert [output.finish_reason for output in core.step()] == [FinishReason.ABORT]
    assert not core.has_work
