"""Who keeps nothing for others computes no head beside a load."""

from __future__ import annotations

import pytest
from kv_run import KvRun, prompt_of

from tierkv.policies.load import LoadChoice, Split

BLOCK = 4


def head_tokens(monkeypatch: pytest.MonkeyPatch, **hints: object) -> int:
    """Tokens that a request computes, though the CPU tier has them, while others are loaded."""
    monkeypatch.setattr(Split, "choose", lambda self, view: LoadChoice(3))
    run = KvRun(num_blocks=12, cpu_blocks=100, load_policy="split", prefetch_policy="none")
    prompt = prompt_of(1, 9 * BLOCK + 1)
    run.ask(prompt)
    for number in range(2, 5):
        run.ask(prompt_of(number, 9 * BLOCK))
    assert run.held(prompt)["gpu"] < 6 and run.held(prompt)["cpu"] == 9
    name = run.add(prompt, **hints)
    request = run.core.scheduler.requests[name]
    run.finish()
    return request.num_head_tokens


def test_a_request_computes_a_head_beside_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert head_tokens(monkeypatch) == 3 * BLOCK


def test_one_that_keeps_nothing_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head would stay its own: what it has loaded would hang on blocks that others bring, and
    that nobody holds."""
    assert head_tokens(monkeypatch, no_store=True) == 0
