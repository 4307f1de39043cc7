"""From logits to tokens, for all rows of a step at once.

Order of operations, as in vLLM: raw logits give the log-probabilities that are reported; then
logit bias, min_tokens, repetition / frequency / presence penalties, temperature, min-p, top-k,
top-p, and one draw.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierkv.types import Logprob, PositionLogprobs, RowResult, SampledToken

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tierkv.engine.plan import Plan, PlanRow
    from tierkv.engine.request import Sequence
    from tierkv.engine.sampling_params import SamplingParams

_NUCLEUS_CANDIDATES = 256  # a nucleus is nearly always smaller; the rest pays for a full sort
_PROMPT_ROWS_AT_ONCE = 128  # bounds the scratch memory of prompt logprobs
_LARGEST_BIAS = 1e30  # instead of +inf, which has no softmax
_NEVER = float("-inf")


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that draws token `position` of sample `index` under `seed`."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, index, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


class _Traits:
    """What a sequence's parameters ask of the sampler, looked up once per sequence."""

    __slots__ = ("bias", "has_edits", "has_filter", "is_greedy", "params", "wants_prompt")

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.is_greedy = params.is_greedy
        self.bias = list((params.logit_bias or {}).items())
        self.has_edits = bool(self.bias) or params.min_tokens > 0 or params.has_penalties
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
        self._penalties: _PenaltyCounts | None = None

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
        edited = self._edit(raw, [d for d in draws if d.traits.has_edits])
        self._choose(edited, draws)
        self._add_logprobs(raw, [d for d in draws if d.traits.params.logprobs is not None])
        return results

    def forget(self, seq_id: int) -> None:
        """Drop the state of a finished sequence; unknown ids are ignored."""
        self._traits.pop(seq_id, None)
        if self._penalties is not None:
            self._penalties.forget(seq_id)

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
                traits = known[seq.seq_id] = _Traits(seq.request.params)
            if traits.wants_prompt and num == row.num_tokens:
                result.prompt_logprobs = _prompt_logprobs(logits[offset : offset + num], row)
            offset += num
            if row.num_samples:
                draws.append(_Draw(len(draws), seq, traits, row.num_samples, result))
                picked.append(offset - 1)
        return draws, picked

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
        temperature = _column([d.traits.params.temperature for d in draws], logits)
        # Shifted first: dividing by a tiny temperature may then overflow to -inf, never to +inf.
        scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
        if any(d.traits.has_filter for d in draws):
            _filter(scaled, [d.traits.params for d in draws])
        cdf = scaled.exp_().cumsum(-1)
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
        self._add_bias(edited, [d for d in draws if d.traits.bias])
        _mask_stops(edited, draws)
        penalised = [d for d in draws if d.traits.params.has_penalties]
        if penalised:
            if self._penalties is None:
                self._penalties = _PenaltyCounts(raw.shape[-1], raw.device)
            self._penalties.apply(edited, penalised)
        return edited

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


def _mask_stops(edited: Tensor, draws: list[_Draw]) -> None:
    """Forbid EOS and stop ids to sequences that have not reached `min_tokens`."""
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
        edited[_ids(rows, edited), _ids(tokens, edited)] = _NEVER


# -- filters -----------------------------------------------------------------------------------


def _filter(scaled: Tensor, params: list[SamplingParams]) -> None:
    """Set tokens outside min-p, top-k and top-p to -inf, in place.

    Args:
        scaled: `[rows, vocab]`, the maximum of each row is 0.
    """
    if any(p.min_p > 0.0 for p in params):
        floor = _column([math.log(p.min_p) if p.min_p > 0.0 else _NEVER for p in params], scaled)
        scaled.masked_fill_(scaled < floor, _NEVER)
    at = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if not at:
        return
    some = scaled if len(at) == len(params) else scaled[at]
    top_k = [params[i].top_k if params[i].top_k > 0 else scaled.shape[-1] for i in at]
    floor = _column([_NEVER] * len(params), scaled)
    floor[at] = _thresholds(some, top_k, [params[i].top_p for i in at])
    scaled.masked_fill_(scaled < floor, _NEVER)


def _thresholds(scaled: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """`[rows, 1]`: the smallest logit that top-k and top-p (over what top-k leaves) keep."""
    vocab = scaled.shape[-1]
    has_unlimited = any(k >= vocab for k in top_k)
    widest = max([k for k in top_k if k < vocab], default=0)
    num = min(vocab, max(widest, _NUCLEUS_CANDIDATES if has_unlimited else 1))
    floor, is_open = _thresholds_among(scaled, top_k, top_p, num)
    rest: list[int] = is_open.nonzero().squeeze(1).tolist()
    if rest:  # a flat distribution: its nucleus is wider than the candidates
        wide = [top_k[i] for i in rest], [top_p[i] for i in rest]
        floor[rest] = _thresholds_among(scaled[rest], *wide, vocab)[0]
    return floor


def _thresholds_among(
    scaled: Tensor, top_k: list[int], top_p: list[float], num: int
) -> tuple[Tensor, Tensor]:
    """Thresholds found among the `num` best tokens, and which rows need more than those."""
    vocab = scaled.shape[-1]
    values = scaled.topk(num).values
    limit = _ids(top_k, scaled).unsqueeze(1)
    is_candidate = torch.arange(num, device=scaled.device) < limit
    weights = values.exp() * is_candidate
    is_unlimited = limit >= vocab
    total = weights.sum(-1, keepdim=True)
    if num < vocab and bool(is_unlimited.any()):
        total = torch.where(is_unlimited, scaled.exp().sum(-1, keepdim=True), total)
    # p = 1 keeps everything, whatever the rounding of the sums says.
    mass = _column([p if p < 1.0 else math.inf for p in top_p], scaled) * total
    reached = weights.cumsum(-1)
    is_kept = is_candidate.clone()
    is_kept[:, 1:] &= reached[:, :-1] < mass
    last = is_kept.sum(-1, keepdim=True) - 1
    is_open = (is_unlimited & (reached[:, -1:] < mass)).squeeze(1) & (num < vocab)
    return values.gather(1, last), is_open


# -- penalties ---------------------------------------------------------------------------------


class _PenaltyCounts:
    """Which tokens each penalised sequence has seen, as rows of two tensors.

    A sequence gets a row the first time it samples (so a fork starts from its own `token_ids`),
    and each step adds only the tokens that are new since.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._generated = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._is_in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._slot_of: dict[int, int] = {}
        self._num_seen: dict[int, int] = {}
        self._free: list[int] = []

    def forget(self, seq_id: int) -> None:
        slot = self._slot_of.pop(seq_id, None)
        if slot is not None:
            self._free.append(slot)
            del self._num_seen[seq_id]

    def apply(self, logits: Tensor, draws: list[_Draw]) -> None:
        """Penalise the rows `draw.at` of `logits` in place."""
        slots = _ids([self._slot(d.seq) for d in draws], logits)
        self._count_new(draws)
        params = [d.traits.params for d in draws]
        count, at = self._generated[slots], _ids([d.at for d in draws], logits)
        rows = logits[at]
        repetition = _column([p.repetition_penalty for p in params], logits)
        is_repeated = self._is_in_prompt[slots] | (count > 0)
        harder = torch.where(rows > 0, rows / repetition, rows * repetition)
        rows = torch.where(is_repeated, harder, rows)
        rows -= _column([p.frequency_penalty for p in params], logits) * count
        rows -= _column([p.presence_penalty for p in params], logits) * (count > 0)
        logits[at] = rows

    def _slot(self, seq: Sequence) -> int:
        slot = self._slot_of.get(seq.seq_id)
        if slot is None:
            if not self._free:
                self._grow()
            slot = self._slot_of[seq.seq_id] = self._free.pop()
            self._num_seen[seq.seq_id] = seq.num_prompt_tokens
            self._generated[slot] = 0
            self._is_in_prompt[slot] = False
            prompt = seq.token_ids[: seq.num_prompt_tokens]
            self._is_in_prompt[slot, _ids(prompt, self._generated)] = True
        return slot

    def _grow(self) -> None:
        old = len(self._generated)
        more = max(4, old)
        self._generated = torch.cat([self._generated, self._generated.new_zeros(more, self.vocab)])
        self._is_in_prompt = torch.cat(
            [self._is_in_prompt, self._is_in_prompt.new_zeros(more, self.vocab)]
        )
        self._free.extend(range(old, old + more))

    @property
    def vocab(self) -> int:
        return self._generated.shape[1]

    def _count_new(self, draws: list[_Draw]) -> None:
        slots: list[int] = []
        tokens: list[int] = []
        for draw in draws:
            seq = draw.seq
            new = seq.token_ids[self._num_seen[seq.seq_id] :]
            self._num_seen[seq.seq_id] += len(new)
            slots.extend([self._slot_of[seq.seq_id]] * len(new))
            tokens.extend(new)
        if tokens:
            where = (_ids(slots, self._generated), _ids(tokens, self._generated))
            one = torch.ones(len(tokens), dtype=torch.int32, device=self._generated.device)
            self._generated.index_put_(where, one, accumulate=True)


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
        {t: Logprob(v, rank) for rank, (t, v) in enumerate(zip(row_ids[:k], row, strict=False), 1)}
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
