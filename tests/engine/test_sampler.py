"""The sampler against a plain row-by-row reference, its distributions, and its seeds."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.request import Request, Sequence
from tierkv.engine.sampler import TorchSampler, uniform
from tierkv.engine.sampling_params import SamplingParams
from tierkv.types import PositionLogprobs, RowResult

VOCAB = 40
EOS = 3
_seq_ids = iter(range(10**9))


def make_seq(
    prompt: list[int], output: list[int] | None = None, index: int = 0, **params: Any
) -> Sequence:
    request = Request(
        "r", prompt, SamplingParams(**params), max_tokens=100, eos_token_ids=frozenset({EOS})
    )
    return Sequence(next(_seq_ids), request, index, prompt + (output or []))


def decode_row(seq: Sequence, num_samples: int = 1) -> PlanRow:
    return PlanRow(seq, len(seq.token_ids) - 1, 1, num_samples, 1)


def sample(
    sampler: TorchSampler, logits: torch.Tensor, seqs: list[Sequence], num_samples: int = 1
) -> list[RowResult]:
    rows = [decode_row(seq, num_samples) for seq in seqs]
    return sampler.draw(logits, Plan(rows)).results()


def tokens_of(results: list[RowResult]) -> list[list[int]]:
    return [[s.token_id for s in result.samples] for result in results]


# -- the reference: one row, plain Python --------------------------------------------------------


def edited_logits(row: list[float], seq: Sequence) -> list[float]:
    p, out = seq.request.params, list(row)
    for token, value in (p.logit_bias or {}).items():
        out[token] += value
    generated = Counter(seq.token_ids[seq.num_prompt_tokens :])
    if seq.num_generated < p.min_tokens:
        for token in seq.request.stop_token_ids:
            out[token] = -math.inf
    for token in range(len(out)):
        if token in seq.token_ids and p.repetition_penalty != 1.0:
            factor = p.repetition_penalty
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        out[token] -= p.frequency_penalty * generated[token]
        out[token] -= p.presence_penalty * (token in generated)
    return out


def distribution(row: list[float], seq: Sequence) -> list[float]:
    """Probabilities after temperature and filters; tokens tied with the last kept stay."""
    p = seq.request.params
    out = edited_logits(row, seq)
    best = max(out)
    weights = [math.exp((x - best) / p.temperature) for x in out]
    weights = [w if w >= p.min_p else 0.0 for w in weights]
    ranked = sorted(weights, reverse=True)[: p.top_k if p.top_k > 0 else None]
    total, reached, floor = sum(ranked), 0.0, 0.0
    for weight in ranked:
        if p.top_p < 1.0 and reached >= p.top_p * total:
            break
        reached, floor = reached + weight, weight
    kept = [w if w >= floor else 0.0 for w in weights]
    return [w / sum(kept) for w in kept]


def logit_row(seed: int) -> list[float]:
    """Multiples of 1/8, so that there are ties."""
    generator = random.Random(seed)
    return [generator.randint(-40, 40) / 8 for _ in range(VOCAB)]


logit_rows = st.integers(0, 10**6).map(logit_row)
token_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
param_sets = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5])},
    optional={
        "top_k": st.sampled_from([-1, 1, 2, 7, VOCAB, 1000]),
        "top_p": st.sampled_from([0.05, 0.5, 0.93, 1.0]),
        "min_p": st.sampled_from([0.01, 0.2, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "presence_penalty": st.sampled_from([-1.5, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 1.0]),
        "min_tokens": st.sampled_from([2, 6]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-9.0, 9.0])),
        "stop_token_ids": st.just([5, 7]),
        "seed": st.integers(0, 2**40),
    },
)
cases = st.lists(
    st.tuples(logit_rows, token_lists, token_lists, param_sets), min_size=1, max_size=8
)


@settings(max_examples=120, deadline=None)
@given(cases)
def test_tokens_follow_the_reference(case: list[tuple[Any, ...]]) -> None:
    """Greedy and seeded rows exactly, others within their support; all in one batch."""
    seqs = [make_seq(prompt, output, **params) for _, prompt, output, params in case]
    rows = [row for row, *_ in case]
    logits = torch.tensor(rows)
    before = logits.clone()
    (*found,) = tokens_of(sample(TorchSampler(), logits, seqs))
    assert torch.equal(logits, before)
    for row, seq, (token,) in zip(rows, seqs, found, strict=True):
        p = seq.request.params
        if p.is_greedy:
            edited = edited_logits(row, seq)
            assert edited[token] == pytest.approx(max(edited), abs=1e-5)
            continue
        weights = distribution(row, seq)
        assert weights[token] > 0
        if p.seed is not None:
            u = uniform(p.seed, 0, seq.num_generated)
            below = sum(weights[:token])
            assert below - 1e-4 <= u <= below + weights[token] + 1e-4


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, [9, 4, 30]] = 1.0
    seqs = [make_seq([1], temperature=0.0) for _ in range(2)]
    assert tokens_of(sample(TorchSampler(), logits, seqs)) == [[0], [4]]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 1.7},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.02},
        {"logit_bias": {0: 3.0, 1: -100.0}, "presence_penalty": 1.0},
        {"seed": 7},
    ],
    ids=str,
)
def test_frequencies_match_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 20,000 draws: n samples of each of many rows."""
    row = (torch.arange(VOCAB) * 7 % VOCAB).float().div(9)
    sampler, count, draws = TorchSampler(seed=1), Counter[int](), 20_000
    for i in range(draws // 1000):
        seq = make_seq([1, 2], [4] * (i + 1), n=1000, **params)
        for result in sample(sampler, row.unsqueeze(0), [seq], num_samples=1000):
            count.update(s.token_id for s in result.samples)
    expected = distribution(row.tolist(), make_seq([1, 2], [4], n=1000, **params))
    assert sum(count.values()) == draws
    assert all(expected[token] > 0 for token in count)
    statistic = sum(
        (count[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(expected) if p * draws > 5
    )
    free = sum(p * draws > 5 for p in expected) - 1
    # Mean `free`, variance `2 free`: five standard deviations never happen by chance.
    assert statistic < free + 5 * math.sqrt(2 * max(free, 1)) + 1


def test_flat_distributions_need_more_than_the_candidates() -> None:
    """A nucleus wider than the candidates looked at first."""
    vocab, p = 5000, 0.5
    logits = torch.zeros(2, vocab)
    logits[0] = torch.linspace(0, 1e-3, vocab)
    logits[1, 17] = 50.0
    sampler = TorchSampler()
    seqs = [make_seq([1], n=400, top_p=p, seed=3) for _ in range(2)]
    flat, peaked = tokens_of(sample(sampler, logits, seqs, num_samples=400))
    assert min(flat) >= vocab * (1 - p) - 5
    assert min(flat) < vocab * (1 - p) + 100  # the nucleus is used down to its edge
    assert max(flat) > vocab - 100
    assert set(peaked) == {17}


def test_seeds_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, VOCAB) * 3

    def run(order: list[int], seed: int) -> dict[int, int]:
        seqs = [make_seq([1], [2, 4], seed=100 + i, top_p=0.9) for i in order]
        found = sample(TorchSampler(seed), logits[order], seqs)
        return {i: tokens[0] for i, tokens in zip(order, tokens_of(found), strict=True)}

    together = run(list(range(6)), seed=1)
    assert run([5, 3, 1, 0, 2, 4], seed=2) == together
    for i in range(6):
        assert run([i], seed=3) == {i: together[i]}


def test_parallel_samples_have_their_own_numbers() -> None:
    """Sample i of a seeded request, at its first token (one row) and later (its own row)."""
    logits = torch.zeros(1, 1000)
    (first,) = tokens_of(sample(TorchSampler(), logits, [make_seq([1], n=8, seed=5)], 8))
    assert len(set(first)) > 5
    again = [int(uniform(5, i, 0) * 1000) for i in range(8)]
    assert first == again
    later = [make_seq([1], [9], index=i, n=8, seed=5) for i in range(8)]
    found = tokens_of(sample(TorchSampler(), logits.expand(8, -1), later))
    assert [t for (t,) in found] == [int(uniform(5, i, 1) * 1000) for i in range(8)]


def test_unseeded_requests_follow_the_engine_s_seed() -> None:
    logits = torch.zeros(50, 1000)
    runs = [
        tokens_of(sample(TorchSampler(seed), logits, [make_seq([1]) for _ in range(50)]))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_extreme_values_stay_finite() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 6] = 1e30
    logits[:, 8] = 1e-3
    seqs = [
        make_seq([1], temperature=1e-30),
        make_seq([1], temperature=100.0, logit_bias={9: math.inf}, top_p=1e-9),
        make_seq([1], logit_bias={6: -math.inf}, temperature=1e-30),
        make_seq([1], repetition_penalty=100.0, top_k=2**62, frequency_penalty=-2.0),
    ]
    assert tokens_of(sample(TorchSampler(), logits, seqs)) == [[6], [9], [8], [6]]


def test_a_bias_against_all_that_is_allowed_leaves_it_allowed() -> None:
    params: dict[str, Any] = {"allowed_token_ids": [6, 7], "logit_bias": {6: -math.inf, 7: -1e38}}
    seqs = [make_seq([1], temperature=t, seed=3, **params) for t in (0.0, 1.0, 1e-4)]
    drawn = tokens_of(sample(TorchSampler(), torch.zeros(3, VOCAB), seqs))
    assert {token for row in drawn for token in row} <= {6, 7}


def test_min_tokens_forbids_every_stop_until_reached() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 11], logits[0, 12] = 9.0, 8.0, 7.0
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [11]}
    sampler = TorchSampler()
    assert tokens_of(sample(sampler, logits, [make_seq([1], [5], **params)])) == [[12]]
    assert tokens_of(sample(sampler, logits, [make_seq([1], [5, 5], **params)])) == [[EOS]]
    ignoring = make_seq([1], [5], ignore_eos=True, **params)
    assert tokens_of(sample(sampler, logits, [ignoring])) == [[EOS]]


def test_a_stop_that_alone_is_allowed_is_drawn_before_min_tokens_too() -> None:
    logits = torch.zeros(2, VOCAB)
    params: dict[str, Any] = {"min_tokens": 5, "stop_token_ids": [11]}
    only = make_seq([1], [5], allowed_token_ids=[11], temperature=0.0, **params)
    drawn = make_seq([1], [5], allowed_token_ids=[EOS, 11], temperature=1.0, seed=1, **params)
    (first,), (second,) = tokens_of(sample(TorchSampler(), logits, [only, drawn]))
    assert first == 11 and second in (EOS, 11)


def test_penalties_keep_count_over_many_steps_forks_and_reuse_of_rows() -> None:
    """Incremental counts equal those of a fresh sampler, while sequences come, fork and go."""
    generator = torch.Generator().manual_seed(0)
    params: dict[str, Any] = {
        "temperature": 0.0,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.2,
    }
    sampler, live = TorchSampler(), [make_seq([1, 2, 2], **params)]
    for step in range(60):
        if step % 4 == 0:
            live.append(make_seq([step % VOCAB], **params))
        if step % 7 == 3:
            parent = live[-1]
            output = parent.token_ids[parent.num_prompt_tokens :]
            live.append(make_seq(parent.request.prompt_token_ids, output, **params))
        if step % 5 == 4:
            sampler.forget(live.pop(0).seq_id)
        logits = torch.randn(len(live), VOCAB, generator=generator)
        found = tokens_of(sample(sampler, logits, live))
        assert found == tokens_of(sample(TorchSampler(), logits, live))
        for row, seq, (token,) in zip(logits.tolist(), live, found, strict=True):
            edited = edited_logits(row, seq)
            assert edited[token] == pytest.approx(max(edited), abs=1e-5)
            seq.token_ids.append(token)
    sampler.forget(10**9)  # unknown


# -- log-probabilities ---------------------------------------------------------------------------


def check_logprobs(entry: PositionLogprobs, row: torch.Tensor, k: int, chosen: int) -> None:
    expected = row.log_softmax(-1)
    best = sorted(range(len(row)), key=lambda t: -expected[t])[:k]
    assert set(entry) == {*best, chosen}
    for token, found in entry.items():
        assert found.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert found.rank == 1 + int((expected > expected[token]).sum())


def test_logprobs_are_of_the_raw_logits() -> None:
    torch.manual_seed(2)
    logits = torch.randn(5, VOCAB) * 2
    ks = [0, 1, 5, VOCAB + 5, None]
    seqs = [make_seq([1], temperature=3.0, logit_bias={4: 5.0}, logprobs=k) for k in ks]
    results = sample(TorchSampler(), logits, seqs)
    for row, k, result in zip(logits, ks, results, strict=True):
        (only,) = result.samples
        if k is None:
            assert only.logprobs is None
        else:
            assert only.logprobs is not None
            check_logprobs(only.logprobs, row, k, only.token_id)


def test_logprobs_of_parallel_samples() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    (result,) = sample(TorchSampler(), logits, [make_seq([1], n=20, logprobs=2)], 20)
    assert len(result.samples) == 20
    for drawn in result.samples:
        assert drawn.logprobs is not None
        check_logprobs(drawn.logprobs, logits[0], 2, drawn.token_id)


def test_prompt_logprobs_come_chunk_by_chunk_beside_other_rows() -> None:
    torch.manual_seed(4)
    prompt = [int(t) for t in torch.randint(0, VOCAB, (300,))]
    seq = make_seq(prompt, temperature=0.0, prompt_logprobs=3, logprobs=1)
    other = make_seq([1], temperature=0.0)
    silent = make_seq([1, 2, 3, 4])
    logits = torch.randn(301, VOCAB)
    sampler = TorchSampler()
    first = Plan([PlanRow(silent, 0, 2, 0, 0), PlanRow(seq, 0, 160, 0, 160), decode_row(other)])
    second = Plan([decode_row(other), PlanRow(seq, 160, 140, 1, 140)])
    a = sampler.draw(torch.cat([logits[:160], logits[300:]]), first).results()
    b = sampler.draw(torch.cat([logits[300:], logits[160:300]]), second).results()
    assert [len(r.samples) for r in a] == [0, 0, 1]
    assert [len(r.samples) for r in b] == [1, 1]
    entries = a[1].prompt_logprobs + b[1].prompt_logprobs
    assert len(entries) == 299  # nothing predicts the first token
    for j, entry in enumerate(entries):
        check_logprobs(entry, logits[j], 3, prompt[j + 1])
    assert b[1].samples[0].token_id == int(logits[299].argmax())


def test_prompt_logprobs_when_a_chunk_is_one_token() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
    seq = make_seq([7, 8], temperature=0.0, prompt_logprobs=0)
    plan = Plan([PlanRow(seq, 0, 1, 0, 1)])
    (result,) = TorchSampler().draw(logits, plan).results()
    (entry,) = result.prompt_logprobs
    assert not result.samples
    check_logprobs(entry, logits[0], 0, 8)


def test_an_empty_step_and_a_step_without_logits() -> None:
    sampler = TorchSampler()
    assert sampler.draw(torch.empty(0, VOCAB), Plan()).results() == []
    plan = Plan([PlanRow(make_seq([1, 2, 3]), 0, 2, 0, 0)])
    assert sampler.draw(torch.empty(0, VOCAB), plan).results() == [RowResult()]
