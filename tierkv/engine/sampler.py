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

Nothing is read from the device before the results are asked for; until then the next step may take
its tokens from there, and the logits may be overwritten. On a CPU, where nobody waits, a nucleus
that is wider than the candidates is looked for again; on a GPU a kernel finds it.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tierkv.engine import sampler_filters as filters
from tierkv.engine.grammar_masks import GrammarMasks
from tierkv.engine.request import SeqState
from tierkv.engine.sampler_filters import NEVER as _NEVER
from tierkv.engine.sampler_filters import column as _column
from tierkv.engine.sampler_filters import ids as _ids
from tierkv.engine.sampler_logprobs import UnreadLogprobs, UnreadPromptLogprobs
from tierkv.engine.sampler_unread import HostCopy, UnreadTokens
from tierkv.model.inputs import to_device
from tierkv.types import RowResult, SampledToken

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tierkv.engine.plan import Plan, PlanRow
    from tierkv.engine.request import Request, Sequence

_NUCLEUS_CANDIDATES = 256  # a nucleus is nearly always smaller; the rest pays for a full sort
_MIN_TEMPERATURE = 1e-5
_NO_NUMBERS = torch.empty(0, 0, dtype=torch.float64)
_LARGEST_BIAS = 1e30  # instead of infinity: a row of nothing else has no softmax


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

    def draw(self, logits: Tensor, plan: Plan) -> UnreadTokens:
        """See `tierkv.protocols.Sampler`.

        Args:
            logits: fp32 `[sum(row.num_logit_rows), vocab]`, rows in plan order; neither modified
                nor wanted later.
        """
        results = [RowResult() for _ in plan.rows]
        draws, prompts, picked = self._collect(logits, plan.rows, results)
        is_all = len(picked) == logits.shape[0]
        raw = logits if is_all else logits.index_select(0, _ids(picked, logits))
        if not self._grammars.is_empty:
            raw = self._constrain(raw, draws)
        edited = self._edit(raw, [d for d in draws if d.traits.has_edits])
        choice = self._prepare(draws)
        tokens = choice.choose(edited)
        wanted = [d for d in draws if d.traits.params.logprobs is not None]
        logprobs = _find_logprobs(raw, wanted, tokens, choice) if wanted else None

        def fill(found: list[int]) -> list[RowResult]:
            choice.share_out(found)
            self._end_complete(draws)
            if logprobs is not None:
                _share_logprobs(logprobs, wanted)
            for result, unread in prompts:
                result.prompt_logprobs = unread.read()
            return results

        return UnreadTokens(tokens, choice.places, fill)

    def forget(self, seq_id: int) -> None:
        """Drop the state of a finished sequence; unknown ids are ignored."""
        self._traits.pop(seq_id, None)
        self._seen.pop(seq_id, None)
        self._grammars.forget(seq_id)

    def _collect(
        self, logits: Tensor, rows: Seq[PlanRow], results: list[RowResult]
    ) -> tuple[list[_Draw], list[tuple[RowResult, UnreadPromptLogprobs]], list[int]]:
        """The rows that sample, those whose prompt is wanted, and the logits row of each draw."""
        draws: list[_Draw] = []
        prompts: list[tuple[RowResult, UnreadPromptLogprobs]] = []
        picked: list[int] = []
        known, offset = self._traits, 0
        for row, result in zip(rows, results, strict=True):
            num, seq = row.num_logit_rows, row.seq
            offset += num
            if num == 0 or seq.state is SeqState.FINISHED:  # since it was planned
                continue
            traits = known.get(seq.seq_id)
            if traits is None:
                traits = self._learn(seq)
            if traits.wants_prompt and num == row.num_tokens:
                found = UnreadPromptLogprobs(logits[offset - num : offset], row)
                prompts.append((result, found))
            if row.num_samples:
                draws.append(_Draw(len(draws), seq, traits, row.num_samples, result))
                picked.append(offset - 1)
        return draws, prompts, picked

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
            # One that was aborted while its tokens were under way has no state any more.
            if draw.traits.has_grammar and draw.seq.state is not SeqState.FINISHED:
                for drawn in draw.result.samples:
                    drawn.ending = self._grammars.ending(draw.seq, drawn.token_id)

    # -- choosing ------------------------------------------------------------------------------

    def _prepare(self, draws: list[_Draw]) -> _Choice:
        greedy = [d for d in draws if d.traits.is_greedy]
        drawn = [d for d in draws if not d.traits.is_greedy]
        return _Choice(greedy, drawn, self._uniforms(drawn) if drawn else _NO_NUMBERS)

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
            bounded = [max(-_LARGEST_BIAS, min(v, _LARGEST_BIAS)) for v in values]
            bias = _column(bounded, edited).squeeze(1)
            edited.index_put_((_ids(rows, edited), _ids(tokens, edited)), bias, accumulate=True)


@dataclass(frozen=True, slots=True)
class _Choice:
    """The draws of a step in the order of their tokens on the device: one for each greedy row,
    then `width` for each drawn row.

    Attributes:
        greedy, drawn: the draws.
        uniforms: fp64 `[len(drawn), width]`, what they are drawn with.
    """

    greedy: list[_Draw]
    drawn: list[_Draw]
    uniforms: Tensor

    def choose(self, logits: Tensor) -> Tensor:
        """The tokens, int64 `[n]` on the device.

        Args:
            logits: `[draws, vocab]`.
        """
        found = [logits.new_empty(0, dtype=torch.int64)]
        if self.greedy:
            found.append(_rows(logits, self.greedy).argmax(-1))
        if self.drawn:
            found.append(self._draw(_rows(logits, self.drawn)).flatten())
        return torch.cat(found) if len(found) > 2 else found[-1]

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens `[len(drawn), width]`. A row that is open, as it may be on a CPU, is drawn again
        among more candidates, with the same uniform numbers."""
        params, num_candidates = [d.traits.params for d in self.drawn], _NUCLEUS_CANDIDATES
        tokens, is_open = filters.draw(logits, params, self.uniforms, num_candidates)
        if not filters.may_stay_open(params, logits.shape[-1], num_candidates, logits.device):
            return tokens
        rows = list(range(len(params)))
        while rows := [i for i, again in zip(rows, HostCopy(is_open).read(), strict=True) if again]:
            num_candidates *= 16
            at, uniforms = _ids(rows, logits), self.uniforms.index_select(0, torch.tensor(rows))
            again, is_open = filters.draw(
                logits.index_select(0, at), [params[i] for i in rows], uniforms, num_candidates
            )
            tokens.index_copy_(0, at, again)
        return tokens

    def places(self) -> dict[int, int]:
        """Where the first token of each sequence is."""
        width, split = self.uniforms.shape[1], len(self.greedy)
        places = {draw.seq.seq_id: at for at, draw in enumerate(self.greedy)}
        return places | {d.seq.seq_id: split + at * width for at, d in enumerate(self.drawn)}

    def share_out(self, tokens: list[int]) -> None:
        """Append the tokens to the draws' results."""
        for draw, token in zip(self.greedy, tokens, strict=False):
            draw.result.samples.extend(SampledToken(token) for _ in range(draw.num_samples))
        width, first = self.uniforms.shape[1], len(self.greedy)
        for draw in self.drawn:
            draw.result.samples.extend(map(SampledToken, tokens[first : first + draw.num_samples]))
            first += width


def _find_logprobs(
    raw: Tensor, draws: list[_Draw], tokens: Tensor, choice: _Choice
) -> UnreadLogprobs:
    """Of the tokens of some draws, each as often as it has samples."""
    places, width = choice.places(), max(d.num_samples for d in draws)
    last = [0 if d.traits.is_greedy else d.num_samples - 1 for d in draws]
    at = [
        places[d.seq.seq_id] + min(i, most)
        for d, most in zip(draws, last, strict=True)
        for i in range(width)
    ]
    chosen = tokens.index_select(0, _ids(at, tokens)).view(len(draws), width)
    return UnreadLogprobs(_rows(raw, draws), [d.traits.params.logprobs or 0 for d in draws], chosen)


def _share_logprobs(logprobs: UnreadLogprobs, draws: list[_Draw]) -> None:
    """Add what was found to the draws' results."""
    found = logprobs.read([[s.token_id for s in d.result.samples] for d in draws])
    for draw, per_sample in zip(draws, found, strict=True):
        for sample, entry in zip(draw.result.samples, per_sample, strict=True):
            sample.logprobs = entry


def _rows(logits: Tensor, draws: list[_Draw]) -> Tensor:
    """The logits of `draws`; no copy when that is all of them."""
    if len(draws) == logits.shape[0]:
        return logits
    return logits.index_select(0, _ids([d.at for d in draws], logits))


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
        after = edited[touched]
        is_stuck = (after == _NEVER).all(-1, keepdim=True)
        edited[touched] = torch.where(is_stuck, before, after)


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
    num_entries = sum(len(s.ids) for s in seen)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(lengths, output_size=num_entries)

    def joined(arrays: list[array[int]]) -> Tensor:
        whole = np.concatenate([np.frombuffer(a, np.int64) for a in arrays])
        return to_device(torch.from_numpy(whole), logits.device)

    params = [d.traits.params for d in draws]
    rows, ids = spread(_ids([d.at for d in draws], logits)), joined([s.ids for s in seen])
    counts = joined([s.counts for s in seen])
    repetition = spread(_column([p.repetition_penalty for p in params], logits).squeeze(1))
    frequency = spread(_column([p.frequency_penalty for p in params], logits).squeeze(1))
    presence = spread(_column([p.presence_penalty for p in params], logits).squeeze(1))
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, ids] = values - frequency * counts - presence * (counts > 0)
