"""From logits to tokens, for all rows of a step at once.

Order of operations, as in vLLM: the masks of grammars; from these logits the log-probabilities
that are reported; then allowed tokens, logit bias, min_tokens, repetition / frequency / presence
penalties, temperature, min-p, top-k, top-p, and one draw. What a mask forbids stays at -inf.

A draw inverts the cumulative distribution with one uniform number per sample, in token order.
That is ten times cheaper on a CPU than exponential noise over the vocabulary, and makes seeds
stateless: the uniform number of a seeded request is a hash of (seed, sample index, position), so
a sample depends neither on its batch nor on preemption.

Filters are thresholds on the logit: a token tied with the last one kept is kept too, so the
result does not depend on the order in which a sort leaves ties.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tierkv.engine.grammar_masks import GrammarMasks
from tierkv.types import Logprob, PositionLogprobs, RowResult, SampledToken

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tierkv.engine.plan import Plan, PlanRow
    from tierkv.engine.request import Request, Sequence
    from tierkv.engine.sampling_params import SamplingParams

_NUCLEUS_CANDIDATES = 256  # a nucleus is nearly always smaller; the rest pays for a full sort
_PROMPT_ROWS_AT_ONCE = 128  # bounds the scratch memory of prompt logprobs
_MIN_TEMPERATURE = 1e-5
_LARGEST_BIAS = 1e30  # instead of +inf, which has no softmax
_NEVER = float("-inf")


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that draws token `position` of sample `index` under `seed`."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, index, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


class _Traits:
    """What a sequence's parameters ask of the sampler, looked up once per sequence."""

    __slots__ = (
        "allowed",
        "bias",
        "has_edits",
        "has_filter",
        "has_grammar",
        "is_greedy",
        "params",
        "wants_prompt",
    )

    def __init__(self, request: Request) -> None:
        self.params = params = request.params
        self.has_grammar = request.grammar is not None
        self.allowed = params.allowed_token_ids
        # So close to greedy that dividing by it might overflow; vLLM draws the line there too.
        self.is_greedy = params.temperature < _MIN_TEMPERATURE
        self.bias = list((params.logit_bias or {}).items())
        self.has_edits = (
            bool(self.bias or self.allowed) or params.min_tokens > 0 or params.has_penalties
        )
        self.wants_prompt = params.prompt_logprobs is not None
        self.has_filter = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


@dataclass(slots=True)
class _Draw:
    """One plan row that samples: its logits are row `at` of the batch's `[num_draws, vocab]`."""

    at: int
    seq: Sequence
    traits: _Traits
    num_samples: int
    result: RowResult

    def sample_index(self, i: int) -> int:
        """Which of the request's n samples the i-th token of this draw belongs to."""
        return i if self.num_samples > 1 else self.seq.index


class TorchSampler:
    """Implements `tierkv.protocols.Sampler` with torch on the logits' device.

    Args:
        seed: seeds the generator that requests without a seed share.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._traits: dict[int, _Traits] = {}
        self._seen: dict[int, _Seen] = {}
        self._grammars = GrammarMasks()

    def sample(self, logits: Tensor, plan: Plan) -> list[RowResult]:
        """One result per row of `plan.rows`, in order.

        Args:
            logits: fp32 `[sum(row.num_logit_rows), vocab]`, rows in plan order; not modified.
        """
        results = [RowResult() for _ in plan.rows]
        draws, picked = self._collect(logits, plan.rows, results)
        if not draws:
            return results
        raw = logits if len(picked) == logits.shape[0] else logits[picked]
        if not self._grammars.is_empty:
            raw = self._constrain(raw, draws)
        edited = self._edit(raw, [d for d in draws if d.traits.has_edits])
        self._choose(edited, draws)
        if not self._grammars.is_empty:
            self._end_complete(draws)
        self._add_logprobs(raw, [d for d in draws if d.traits.params.logprobs is not None])
        return results

    def forget(self, seq_id: int) -> None:
        """Drop the state of a finished sequence; unknown ids are ignored."""
        self._traits.pop(seq_id, None)
        self._seen.pop(seq_id, None)
        self._grammars.forget(seq_id)

    def _collect(
        self, logits: Tensor, rows: Seq[PlanRow], results: list[RowResult]
    ) -> tuple[list[_Draw], list[int]]:
        """The rows that sample and the logits row of each; fills in prompt logprobs."""
        draws: list[_Draw] = []
        picked: list[int] = []
        known, offset = self._traits, 0
        for row, result in zip(rows, results, strict=True):
            num = row.num_logit_rows
            if num == 0:
                continue
            seq = row.seq
            traits = known.get(seq.seq_id)
            if traits is None:
                traits = self._learn(seq)
            if traits.wants_prompt and num == row.num_tokens:
                result.prompt_logprobs = _prompt_logprobs(logits[offset : offset + num], row)
            offset += num
            if row.num_samples:
                draws.append(_Draw(len(draws), seq, traits, row.num_samples, result))
                picked.append(offset - 1)
        return draws, picked

    def _learn(self, seq: Sequence) -> _Traits:
        traits = self._traits[seq.seq_id] = _Traits(seq.request)
        if seq.request.grammar is not None:
            self._grammars.add(seq, seq.request.grammar)
        return traits

    # -- grammars ------------------------------------------------------------------------------

    def _constrain(self, raw: Tensor, draws: list[_Draw]) -> Tensor:
        """The logits with what grammars forbid at -inf; `raw` itself when no row has one."""
        bound = [d for d in draws if d.traits.has_grammar]
        if not bound:
            return raw
        return self._grammars.mask(raw, [d.at for d in bound], [d.seq for d in bound])

    def _end_complete(self, draws: list[_Draw]) -> None:
        for draw in draws:
            if draw.traits.has_grammar:
                for drawn in draw.result.samples:
                    drawn.ending = self._grammars.ending(draw.seq, drawn.token_id)

    # -- choosing ------------------------------------------------------------------------------

    def _choose(self, edited: Tensor, draws: list[_Draw]) -> None:
        """Append the sampled tokens of every draw to its result."""
        greedy = [d for d in draws if d.traits.is_greedy]
        for draw, token in zip(greedy, _rows(edited, greedy).argmax(-1).tolist(), strict=True):
            if draw.num_samples == 1:
                draw.result.samples.append(SampledToken(token))
            else:
                draw.result.samples.extend(SampledToken(token) for _ in range(draw.num_samples))
        if len(greedy) < len(draws):
            drawn = [d for d in draws if not d.traits.is_greedy]
            tokens = self._draw_tokens(_rows(edited, drawn), drawn)
            for draw, row in zip(drawn, tokens, strict=True):
                draw.result.samples.extend(map(SampledToken, row[: draw.num_samples]))

    def _draw_tokens(self, logits: Tensor, draws: list[_Draw]) -> list[list[int]]:
        """Tokens `[num_draws, max(num_samples)]` drawn from `logits` `[num_draws, vocab]`."""
        params = [d.traits.params for d in draws]
        scaled = logits
        if any(p.temperature != 1.0 for p in params):
            scaled = logits / _column([p.temperature for p in params], logits)
        if any(d.traits.has_filter for d in draws):
            scaled = _filtered(scaled, params)
        cdf = scaled.softmax(-1).cumsum(-1)
        total = cdf[:, -1:]
        target = (self._uniforms(draws).to(cdf.device) * total).to(cdf.dtype)
        # Below the total, so that the first entry above the target is a token with some mass.
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cdf, target.contiguous(), right=True)
        found: list[list[int]] = tokens.clamp_(max=cdf.shape[-1] - 1).tolist()
        return found

    def _uniforms(self, draws: list[_Draw]) -> Tensor:
        """fp64 `[num_draws, max(num_samples)]`: hashed where seeded, else from the generator."""
        width = max(d.num_samples for d in draws)
        shape = (len(draws), width)
        numbers = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        for at, draw in enumerate(draws):
            seed = draw.traits.params.seed
            if seed is not None:
                position = draw.seq.num_generated
                for i in range(draw.num_samples):
                    numbers[at, i] = uniform(seed, draw.sample_index(i), position)
        return numbers

    # -- edits of the logits -------------------------------------------------------------------

    def _edit(self, raw: Tensor, draws: list[_Draw]) -> Tensor:
        """Logits after bias, min_tokens and penalties; `raw` itself when there are none."""
        if not draws:
            return raw
        edited = raw.clone()
        _mask_others(edited, [d for d in draws if d.traits.allowed])
        self._add_bias(edited, [d for d in draws if d.traits.bias])
        _mask_stops(edited, draws)
        penalised = [d for d in draws if d.traits.params.has_penalties]
        if penalised:
            _penalise(edited, penalised, [self._seen_by(d.seq) for d in penalised])
        return edited

    def _seen_by(self, seq: Sequence) -> _Seen:
        seen = self._seen.get(seq.seq_id)
        if seen is None:  # new, or a fork: it starts from its own tokens
            seen = self._seen[seq.seq_id] = _Seen(seq)
        seen.read(seq)
        return seen

    @staticmethod
    def _add_bias(edited: Tensor, draws: list[_Draw]) -> None:
        vocab = edited.shape[-1]
        entries = [(d.at, t, v) for d in draws for t, v in d.traits.bias if t < vocab]
        if entries:
            rows, tokens, values = zip(*entries, strict=True)
            bias = _column([min(v, _LARGEST_BIAS) for v in values], edited).squeeze(1)
            edited.index_put_((_ids(rows, edited), _ids(tokens, edited)), bias, accumulate=True)

    # -- log-probabilities ---------------------------------------------------------------------

    def _add_logprobs(self, raw: Tensor, draws: list[_Draw]) -> None:
        if not draws:
            return
        counts = [d.traits.params.logprobs or 0 for d in draws]
        chosen = [[s.token_id for s in d.result.samples] for d in draws]
        found = _position_logprobs(_rows(raw, draws), counts, chosen)
        for draw, per_sample in zip(draws, found, strict=True):
            for sample, logprobs in zip(draw.result.samples, per_sample, strict=True):
                sample.logprobs = logprobs


def _rows(logits: Tensor, draws: list[_Draw]) -> Tensor:
    """The logits of `draws`; no copy when that is all of them."""
    if len(draws) == logits.shape[0]:
        return logits
    return logits[[d.at for d in draws]]


def _column(values: Seq[float], like: Tensor) -> Tensor:
    """`[len(values), 1]` of the dtype and device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _ids(values: Seq[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _mask_others(edited: Tensor, draws: list[_Draw]) -> None:
    """Forbid all but the allowed tokens."""
    vocab = edited.shape[-1]
    for draw in draws:
        allowed = _ids([t for t in draw.traits.allowed or () if t < vocab], edited)
        row = torch.full_like(edited[draw.at], _NEVER)
        row[allowed] = edited[draw.at, allowed]
        edited[draw.at] = row


def _mask_stops(edited: Tensor, draws: list[_Draw]) -> None:
    """Forbid EOS and stop ids to sequences that have not reached `min_tokens`, unless nothing else
    is left to them: a grammar is complete, or no other token is allowed."""
    vocab = edited.shape[-1]
    entries = [
        (d.at, token)
        for d in draws
        if d.seq.num_generated < d.traits.params.min_tokens
        for token in d.seq.request.stop_token_ids
        if token < vocab
    ]
    if entries:
        rows, tokens = zip(*entries, strict=True)
        touched = _ids(sorted(set(rows)), edited)
        before = edited[touched]
        edited[_ids(rows, edited), _ids(tokens, edited)] = _NEVER
        is_stuck = (edited[touched] == _NEVER).all(-1)
        edited[touched[is_stuck]] = before[is_stuck]


# -- filters -----------------------------------------------------------------------------------


def _filtered(scaled: Tensor, params: list[SamplingParams]) -> Tensor:
    """`scaled` `[rows, vocab]` with tokens outside min-p, top-k and top-p at -inf."""
    if any(p.min_p > 0.0 for p in params):
        share = _column([math.log(p.min_p) if p.min_p > 0.0 else _NEVER for p in params], scaled)
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + share, _NEVER)
    at = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if not at:
        return scaled
    vocab = scaled.shape[-1]
    top_k = [params[i].top_k if 0 < params[i].top_k < vocab else vocab for i in at]
    floor = _column([_NEVER] * len(params), scaled)
    some = scaled if len(at) == len(params) else scaled[at]
    floor[at] = _thresholds(some, top_k, [params[i].top_p for i in at])
    return scaled.masked_fill(scaled < floor, _NEVER)


def _thresholds(scaled: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """`[rows, 1]`: the smallest logit that top-k and top-p (over what top-k leaves) keep."""
    vocab = scaled.shape[-1]
    num = max(_NUCLEUS_CANDIDATES, *(k for k in top_k if k < vocab), 0)
    floor = torch.empty(len(top_k), 1, dtype=scaled.dtype, device=scaled.device)
    rows = list(range(len(top_k)))
    while rows:
        some = scaled if len(rows) == len(top_k) else scaled[rows]
        limits = [top_k[i] for i in rows], [top_p[i] for i in rows]
        floor[rows], is_open = _thresholds_among(some, *limits, min(num, vocab))
        rows = [i for i, more in zip(rows, is_open.tolist(), strict=True) if more]
        num *= 16  # a flat distribution: its nucleus is wider than the candidates
    return floor


def _thresholds_among(
    scaled: Tensor, top_k: list[int], top_p: list[float], num: int
) -> tuple[Tensor, Tensor]:
    """Thresholds found among the `num` best tokens, and which rows need more than those."""
    values = scaled.topk(num).values
    best = values[:, :1]
    limit = _ids(top_k, scaled).unsqueeze(1)
    is_candidate = torch.arange(num, device=scaled.device) < limit
    weights = (values - best).exp() * is_candidate
    total = weights.sum(-1, keepdim=True)
    is_unlimited = limit > num
    if bool(is_unlimited.any()):
        everything = (scaled.logsumexp(-1, keepdim=True) - best).exp()
        total = torch.where(is_unlimited, everything, total)
    # p = 1 keeps everything, whatever the rounding of the sums says.
    mass = _column([p if p < 1.0 else math.inf for p in top_p], scaled) * total
    reached = weights.cumsum(-1)
    is_kept = is_candidate.clone()
    is_kept[:, 1:] &= reached[:, :-1] < mass
    last = is_kept.sum(-1, keepdim=True) - 1
    is_open = (is_unlimited & (reached[:, -1:] < mass)).squeeze(1)
    return values.gather(1, last), is_open


# -- penalties ---------------------------------------------------------------------------------


class _Seen:
    """The distinct tokens of one sequence, and how often each was generated (0: prompt only)."""

    __slots__ = ("counts", "ids", "_index", "_num_read")

    def __init__(self, seq: Sequence) -> None:
        prompt = dict.fromkeys(seq.token_ids[: seq.num_prompt_tokens])
        self._index = {token: i for i, token in enumerate(prompt)}
        self._num_read = seq.num_prompt_tokens
        self.ids = array("q", prompt)
        self.counts = array("q", bytes(8 * len(prompt)))

    def read(self, seq: Sequence) -> None:
        """Count what was generated since the last call."""
        for token in seq.token_ids[self._num_read :]:
            at = self._index.setdefault(token, len(self.ids))
            if at == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[at] += 1
        self._num_read = len(seq.token_ids)


def _penalise(logits: Tensor, draws: list[_Draw], seen: list[_Seen]) -> None:
    """Apply the penalties to row `draw.at` of `logits`, in place, at the tokens it has seen."""
    lengths = _ids([len(s.ids) for s in seen], logits)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(lengths)

    def joined(arrays: list[array[int]]) -> Tensor:
        whole = np.concatenate([np.frombuffer(a, np.int64) for a in arrays])
        return torch.from_numpy(whole).to(logits.device)

    params = [d.traits.params for d in draws]
    rows, ids = spread(_ids([d.at for d in draws], logits)), joined([s.ids for s in seen])
    counts = joined([s.counts for s in seen])
    repetition = spread(_column([p.repetition_penalty for p in params], logits).squeeze(1))
    frequency = spread(_column([p.frequency_penalty for p in params], logits).squeeze(1))
    presence = spread(_column([p.presence_penalty for p in params], logits).squeeze(1))
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, ids] = values - frequency * counts - presence * (counts > 0)


# -- log-probabilities -------------------------------------------------------------------------


def _prompt_logprobs(logits: Tensor, row: PlanRow) -> list[PositionLogprobs]:
    """One entry per position of the row whose successor is a prompt token.

    Args:
        logits: `[row.num_tokens, vocab]`; row j predicts position `row.start + j + 1`.
    """
    seq = row.seq
    end = min(row.start + 1 + row.num_tokens, seq.num_prompt_tokens)
    targets = seq.token_ids[row.start + 1 : end]
    count = seq.request.params.prompt_logprobs or 0
    found: list[PositionLogprobs] = []
    for start in range(0, len(targets), _PROMPT_ROWS_AT_ONCE):
        part = targets[start : start + _PROMPT_ROWS_AT_ONCE]
        raw = logits[start : start + len(part)]
        for (entry,) in _position_logprobs(raw, [count] * len(part), [[t] for t in part]):
            found.append(entry)
    return found


def _position_logprobs(
    raw: Tensor, counts: list[int], chosen: list[list[int]]
) -> list[list[PositionLogprobs]]:
    """For each row and each token chosen from it: the best candidates, then the chosen token.

    Args:
        raw: `[rows, vocab]`.
        counts: candidates per row.
        chosen: token ids per row.
    """
    norm = raw.logsumexp(-1, keepdim=True)
    values, ids = raw.topk(min(max(counts), raw.shape[-1]))
    best = [
        {
            t: Logprob(v, rank)
            for rank, (t, v) in enumerate(zip(row_ids[:k], row, strict=False), 1)
            if v > _NEVER  # a grammar forbids the others
        }
        for row_ids, row, k in zip(ids.tolist(), (values - norm).tolist(), counts, strict=True)
    ]
    outside = [
        (at, token) for at, row in enumerate(chosen) for token in row if token not in best[at]
    ]
    extra = _ranked(raw, norm, sorted(set(outside)))
    return [
        [best[at] if token in best[at] else {**best[at], token: extra[at, token]} for token in row]
        for at, row in enumerate(chosen)
    ]


def _ranked(
    raw: Tensor, norm: Tensor, pairs: list[tuple[int, int]]
) -> dict[tuple[int, int], Logprob]:
    """Logprob and rank of single (row, token) pairs; tied tokens share the best rank."""
    if not pairs:
        return {}
    at, tokens = (_ids(column, raw) for column in zip(*pairs, strict=True))
    value = raw[at, tokens].unsqueeze(1)
    ranks = (raw[at] > value).sum(-1).add_(1).tolist()
    logprobs = (value - norm[at]).squeeze(1).tolist()
    return {pair: Logprob(lp, rank) for pair, lp, rank in zip(pairs, logprobs, ranks, strict=True)}
