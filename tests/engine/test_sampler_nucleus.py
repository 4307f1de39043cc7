"""Nuclei wider than the candidates: drawn again on a CPU, found by a kernel on a GPU, equal."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tierkv.engine import sampler_filters as filters
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.request import Request, Sequence
from tierkv.engine.sampler import TorchSampler
from tierkv.engine.sampling_params import SamplingParams

VOCAB = 3000
CANDIDATES = 64


def edge_free_top_p(row: Tensor, rng: random.Random, params: SamplingParams) -> float:
    """A share of the mass halfway up that of a token, which no rounding adds or drops."""
    scaled = row.double() / params.temperature
    weights = (scaled - scaled.max()).exp()
    weights[weights < params.min_p] = 0.0
    levels, counts = weights[weights > 0].unique(return_counts=True)
    shares = (levels * counts).flip(0) / (levels * counts).sum()
    halfway = shares.cumsum(0) - shares / 2
    is_safe = (shares > 5e-5) & (halfway > 0.1) & (halfway < 0.9)
    return rng.choice(halfway[is_safe].tolist())


def flat_rows(rng: random.Random) -> tuple[Tensor, list[SamplingParams]]:
    """Rows that need more than the candidates, and rows that do not, of all kinds."""
    logits = torch.rand(11, VOCAB)
    logits[1] = torch.linspace(0, 1e-2, VOCAB)[torch.randperm(VOCAB)]
    logits[2] = torch.randint(0, 9, (VOCAB,)) / 8
    logits[3, rng.sample(range(VOCAB), VOCAB // 2)] = -torch.inf
    logits[4] = torch.randn(VOCAB) * 3
    asked: list[dict[str, Any]] = [{} for _ in range(8)]
    asked[5] = {"temperature": 0.4}
    asked[6] = {"temperature": 1.5, "min_p": 0.7}
    asked[7] = {"top_k": VOCAB + 5, "seed": 3}
    params = []
    for row, changes in zip(logits, asked, strict=False):
        top_p = edge_free_top_p(row, rng, SamplingParams(**changes))
        params.append(SamplingParams(top_p=top_p, **changes))
    params += [SamplingParams(top_k=2 * VOCAB), SamplingParams(top_p=0.5, top_k=9)]
    return logits, [*params, SamplingParams()]


def support(logits: Tensor, params: list[SamplingParams], num: int) -> tuple[Tensor, Tensor]:
    """Which tokens can be drawn, and which rows are open."""
    kept, is_open = filters._filtered(logits, params, num)
    return kept > filters.NEVER, is_open


def scaled(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    return logits / torch.tensor([p.temperature for p in params]).unsqueeze(1)


def test_the_kernel_keeps_what_more_candidates_keep(rng, request) -> None:
    logits, params = flat_rows(rng)
    scores = scaled(logits, params)
    _, is_open = support(scores, params, CANDIDATES)
    wanted, is_still_open = support(scores, params, VOCAB)
    assert is_open.sum() >= 6 and not is_still_open.any()
    kernel = request.getfixturevalue("final_draws")
    found, none_is_open = support(scores, params, CANDIDATES)
    assert torch.equal(found & (logits > -torch.inf), wanted & (logits > -torch.inf))
    assert not none_is_open.any() and kernel.num_launches == 1


def sampled(logits: Tensor, params: list[SamplingParams]) -> list[list[int]]:
    sequences = [
        Sequence(n, Request(str(n), [1], p, max_tokens=9, eos_token_ids=frozenset()), 0, [1])
        for n, p in enumerate(params)
    ]
    unread = TorchSampler(7).draw(logits, Plan([PlanRow(s, 0, 1, 5, 1) for s in sequences]))
    return [[s.token_id for s in result.samples] for result in unread.results()]


def test_the_tokens_are_the_same(rng, request, monkeypatch) -> None:
    monkeypatch.setattr("tierkv.engine.sampler._NUCLEUS_CANDIDATES", CANDIDATES)
    logits, params = flat_rows(rng)
    wanted = sampled(logits, params)
    kernel = request.getfixturevalue("final_draws")
    assert sampled(logits, params) == wanted
    assert kernel.num_launches == 1


def test_rows_that_cannot_be_open_launch_nothing(final_draws) -> None:
    logits = torch.rand(3, VOCAB)
    asked = [{"top_p": 0.9, "top_k": 500}, {"top_k": VOCAB}, {"min_p": 0.1}]
    sampled(logits, [SamplingParams(**changes) for changes in asked])
    assert final_draws.num_launches == 0


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("top_k", [-1, 0, 1, CANDIDATES, 200, VOCAB - 1, VOCAB, VOCAB + 1])
@pytest.mark.parametrize("vocab", [CANDIDATES, VOCAB])
def test_what_may_stay_open_is_known_before(vocab, top_k, top_p) -> None:
    """On equal logits, the flattest of all, it does stay open."""
    params = SamplingParams(top_p=top_p, top_k=top_k)
    logits = torch.zeros(1, vocab)
    uniforms = torch.rand(1, 1, dtype=torch.float64)
    _, is_open = filters.draw(logits, [params], uniforms, CANDIDATES)
    asked = [SamplingParams(), params]
    assert filters.may_stay_open(asked, vocab, CANDIDATES, logits.device) == bool(is_open)
    assert not filters.may_stay_open(asked, vocab, CANDIDATES, torch.device("cuda"))
