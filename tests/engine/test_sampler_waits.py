"""How often the sampler waits for the device that has the logits: once a step, for the tokens, and
not before somebody asks for them.

On a GPU a tensor that the host reads, an index whose size depends on values, and a plain list that
becomes an index all wait until the device has done everything before. The calls are the same on a
CPU, where they are counted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tierkv.engine import sampler as sampler_module
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.request import Request, Sequence
from tierkv.engine.sampler import TorchSampler
from tierkv.engine.sampling_params import SamplingParams

VOCAB = 600
_READS = {"tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"}
_INDEXING = {"__getitem__", "__setitem__"}


class Waits(TorchFunctionMode):
    """Names of the calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        indexes = args[1] if name in _INDEXING and isinstance(args[1], tuple) else args[1:2]
        is_listed = name in _INDEXING and any(isinstance(i, list) or _is_mask(i) for i in indexes)
        is_sized = name == "repeat_interleave" and "output_size" not in kwargs
        if name in _READS or is_listed or is_sized or name == "masked_select":
            self.names.append(name)
        return func(*args, **kwargs)


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool


def make_row(number: int, **params: Any) -> PlanRow:
    request = Request(
        str(number), [1, 2], SamplingParams(**params), max_tokens=9, eos_token_ids=frozenset({3})
    )
    seq = Sequence(number, request, 0, [1, 2, 7])
    return PlanRow(seq, 2, 1, 1, 1)


ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "min_tokens": 4},
    {"temperature": 0.7},
    {"seed": 5},
    {"top_k": 5, "seed": 6},
    {"top_k": 300},
    {"top_p": 0.9, "top_k": 200, "temperature": 0.5},
    {"top_p": 0.5, "top_k": 12, "min_p": 0.01},
    {"min_p": 0.1},
    {"logit_bias": {5: 2.0}, "allowed_token_ids": [5, 6]},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1},
]


def peaked(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, VOCAB, generator=generator) * 6


@pytest.mark.parametrize("has_chunk", [False, True])
def test_the_tokens_of_a_step_are_the_only_thing_that_is_read(has_chunk: bool) -> None:
    rows = [make_row(n, **params) for n, params in enumerate(ASKED)]
    if has_chunk:  # in the middle of a prompt whose logprobs are wanted by nobody
        rows.insert(3, PlanRow(make_row(99).seq, 0, 2, 0, 2))
    logits = peaked(sum(row.num_logit_rows for row in rows))
    sampler = TorchSampler(1)
    with Waits() as waits:
        unread = sampler.draw(logits, Plan(rows))
    assert waits.names == []
    logits.fill_(math.nan)  # the next step's
    with Waits() as waits:
        results = unread.results()
    assert waits.names == ["tolist"]
    assert [len(result.samples) for result in results] == [row.num_samples for row in rows]


def test_only_greedy_rows_and_only_drawn_rows() -> None:
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.8, "top_k": 9}):
        rows = [make_row(n, **params) for n in range(3)]
        with Waits() as waits:
            TorchSampler().draw(peaked(3), Plan(rows)).results()
        assert waits.names == ["tolist"]


def test_logprobs_come_beside_the_tokens() -> None:
    rows = [make_row(n, temperature=0.0, logprobs=n, prompt_logprobs=2) for n in range(3)]
    rows = [PlanRow(row.seq, 0, 2, 1, 2) for row in rows]
    logits = peaked(6)
    with Waits() as waits:
        unread = TorchSampler().draw(logits, Plan(rows))
    assert waits.names == []
    best = logits.argmax(-1).view(3, 2)[:, 1].tolist()
    logits.fill_(math.nan)
    results = unread.results()
    assert [result.samples[0].token_id for result in results] == best
    for result in results:
        assert next(entry.rank for entry in (result.samples[0].logprobs or {}).values()) == 1
        assert len(result.prompt_logprobs) == 1


def test_a_wide_nucleus_is_drawn_again_from_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among all tokens at once, or among more and more: the same tokens, seeded or not."""
    flat = torch.linspace(0, 1e-2, VOCAB).repeat(4, 1)
    flat[1] = peaked(1)[0]
    found = []
    for num_candidates in (VOCAB, 2):
        monkeypatch.setattr(sampler_module, "_NUCLEUS_CANDIDATES", num_candidates)
        rows = [make_row(n, top_p=0.9, **({"seed": n} if n % 2 else {})) for n in range(4)]
        with Waits() as waits:
            results = TorchSampler(3).draw(flat, Plan(rows)).results()
        found.append([[s.token_id for s in result.samples] for result in results])
        assert waits.names.count("tolist") == (1 if num_candidates == VOCAB else 5)
    assert found[0] == found[1]
    assert all(len(tokens) == 1 for tokens in found[1])


def test_where_draws_are_final_a_wide_nucleus_waits_no_second_time(
    final_draws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "_NUCLEUS_CANDIDATES", 2)
    flat = torch.linspace(0, 1e-2, VOCAB).repeat(4, 1)
    rows = [make_row(n, top_p=0.9, **({"seed": n} if n % 2 else {})) for n in range(4)]
    with Waits() as waits:
        unread = TorchSampler(3).draw(flat, Plan(rows))
    assert waits.names == [] and final_draws.num_launches == 1
    with Waits() as waits:
        results = unread.results()
    assert waits.names == ["tolist"]
    assert all(len(result.samples) == 1 for result in results)
