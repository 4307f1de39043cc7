"""Where the tokens of a prompt came from, as outputs report it: pool, lower tiers, or computed."""

from __future__ import annotations

from typing import Any

import pytest
from ledger import VOCAB, ledger_engine

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.outputs import PromptSources, SequenceOutput
from tierkv.engine.sampling_params import SamplingParams
from tierkv.policies.load import LoadChoice, Split

BLOCK = 4
PROMPT = 10 * BLOCK + 1


def text(start: int, length: int = PROMPT) -> list[int]:
    return [(start + 7 * i) % VOCAB for i in range(length)]


def engine(**options: Any) -> EngineCore:
    values: dict[str, Any] = {
        "num_blocks": 16,
        "block_size": BLOCK,
        "mover": {"is_eager": True, "is_ordered": True},
        "load_policy": "load",
    }
    core, _, _ = ledger_engine(**{**values, **options})
    return core


def ask(core: EngineCore, name: str, token_ids: list[int]) -> SequenceOutput:
    core.add_request(EngineRequest(name, token_ids, SamplingParams(max_tokens=1)))
    outputs: list[SequenceOutput] = []
    while core.has_work:
        outputs += core.step()
        core.check()
    core.flush(10.0)
    return outputs[-1]


def sources(output: SequenceOutput) -> tuple[int, int, int]:
    found = output.prompt_sources
    assert found is not None
    assert output.num_cached_tokens == found.gpu + found.cpu + found.nvme
    return found.gpu, found.cpu, found.nvme


def test_a_prompt_is_computed_once_and_then_found_in_the_pool() -> None:
    core = engine()
    assert sources(ask(core, "first", text(1))) == (0, 0, 0)
    assert sources(ask(core, "second", text(1))) == (40, 0, 0)


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_what_left_the_pool_is_counted_for_the_tier_it_comes_from(tier: str) -> None:
    core = engine(**{f"{tier}_blocks": 100}, prefetch_policy="none")
    ask(core, "first", text(1))
    for i in range(4):
        ask(core, f"other-{i}", text(20 + i, 12 * BLOCK))
    gpu, cpu, nvme = sources(ask(core, "again", text(1)))
    assert gpu == 0
    assert {"cpu": cpu, "nvme": nvme}[tier] == core.metrics()[f"hit_tokens_{tier}"] >= 8 * BLOCK
    assert {"cpu": nvme, "nvme": cpu}[tier] == 0


def test_a_part_that_is_computed_beside_a_load_is_not_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[int] = []
    for head in (0, 3):
        monkeypatch.setattr(Split, "choose", lambda self, view, head=head: LoadChoice(head))
        found.append(sum(sources(ask_again())))
    assert found[1] == found[0] - 3 * BLOCK > 0


def ask_again() -> SequenceOutput:
    """The answer to a prompt that has left the pool for the CPU tier."""
    core = engine(cpu_blocks=100, load_policy="split", prefetch_policy="none")
    ask(core, "first", text(1))
    for i in range(4):
        ask(core, f"other-{i}", text(20 + i, 12 * BLOCK))
    return ask(core, "again", text(1))


def test_loads_that_fail_are_taken_back_from_the_slowest_tier_first() -> None:
    found = PromptSources(10, 8, 4)
    found.lose(6)
    assert (found.gpu, found.cpu, found.nvme) == (10, 6, 0)
    found.lose(10)
    assert (found.gpu, found.cpu, found.nvme) == (6, 0, 0)
    found.add(PromptSources(1, 2, 3))
    assert (found.gpu, found.cpu, found.nvme) == (7, 2, 3)


def test_metrics_count_what_the_outputs_say_where_loads_fail() -> None:
    core = engine(
        cpu_blocks=20,
        nvme_blocks=100,
        prefetch_policy="none",
        mover={"failures": 0.2, "is_eager": True, "is_ordered": True},
    )
    found = [sources(ask(core, f"{i}", text(20 + i % 5, 12 * BLOCK))) for i in range(60)]
    counted = core.metrics()
    failures = sum(counted[f"move_failures_{cause}"] for cause in ("corrupt", "io_error", "lost"))
    assert failures and counted["hit_tokens"] == sum(map(sum, found))
    tiers = counted["hit_tokens_cpu"], counted["hit_tokens_nvme"]
    assert tiers == (sum(cpu for _, cpu, _ in found), sum(nvme for *_, nvme in found))
    assert min(tiers) > 0
