"""Beam search: a loop above the engine that chooses every token itself.

The engine computes candidates for each live sequence of a *stepped* request; the search then
continues sequences (`advance`), branches them (`fork`, sharing all blocks) and ends them (`drop`).

The rules are those of transformers' `generate(num_beams=k, do_sample=False)` with
`early_stopping=False`, so that both find the same sequences and scores:

* of all continuations the best `k * max(2, 1 + num_eos)` are looked at; those that end and are
  among the best k become finished hypotheses, the best k that go on are the next beams;
* a finished hypothesis scores `sum(logprobs) / num_generated ** length_penalty`;
* the search ends when the best live beam, scored at its present length, cannot enter the k
  finished ones any more, or at `max_tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from tierkv.engine.core import EngineRequest
from tierkv.engine.outputs import SequenceOutput
from tierkv.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import EngineDeadError, RequestError
from tierkv.types import FinishReason, PositionLogprobs


@dataclass(slots=True, kw_only=True)
class BeamSearchParams:
    """Parameters of a beam search; names follow vLLM.

    Attributes:
        beam_width: live sequences per prompt, and hypotheses returned.
        max_tokens: generated tokens at most.
        length_penalty: exponent of the length in a hypothesis' score; above 0 favours long ones.
        ignore_eos: never end before `max_tokens`.
        temperature: only 0 is offered: the search is deterministic.

    Raises:
        RequestError: a value is out of range; names the field, the value and the fix.
    """

    beam_width: int
    max_tokens: int = 16
    length_penalty: float = 1.0
    ignore_eos: bool = False
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(name, value, "must be a whole number of at least 1")
        if self.temperature != 0.0:
            fix = "beam search does not sample: leave it at 0"
            raise RequestError("temperature", self.temperature, fix)
        penalty = self.length_penalty
        if not isinstance(penalty, (int, float)) or not -100.0 <= penalty <= 100.0:
            raise RequestError("length_penalty", penalty, "must be a number in [-100, 100]")


@dataclass(slots=True)
class BeamHypothesis:
    """One result of a beam search.

    Attributes:
        token_ids: generated tokens, with the end-of-sequence token if that ended it.
        cumulative_logprob: sum of their log-probabilities.
        score: that sum over `len(token_ids) ** length_penalty`.
        finish_reason: "stop" (end of sequence) or "length".
    """

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: str
    text: str = ""


@dataclass(slots=True)
class BeamSearchOutput:
    """The `beam_width` best hypotheses for a prompt, best first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[BeamHypothesis]


class SteppedEngine(Protocol):
    """What a beam search asks of the engine (see `EngineCore`)."""

    def advance(self, seq_id: int, token_id: int) -> None: ...

    def fork(self, seq_id: int, token_id: int) -> int: ...

    def drop(self, seq_id: int) -> None: ...


@dataclass(slots=True)
class _Beam:
    """A live sequence and, once its step has run, the candidates for its next token."""

    token_ids: list[int]
    cumulative_logprob: float
    candidates: PositionLogprobs | None = None


@dataclass(slots=True)
class _Continuation:
    seq_id: int
    token_id: int
    cumulative_logprob: float


@dataclass(slots=True)
class BeamSearch:
    """The search for one prompt.

    Feed it every output of its request with `update`, then call `proceed` after each step.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    cache_salt: str = ""
    is_finished: bool = False
    _beams: dict[int, _Beam] = field(default_factory=dict)
    _hypotheses: list[BeamHypothesis] = field(default_factory=list)
    _num_candidates: int = 0

    def __post_init__(self) -> None:
        if self.params.ignore_eos:
            self.eos_token_ids = frozenset()
        width = self.params.beam_width
        self._num_candidates = width * max(2, 1 + len(self.eos_token_ids))
        if self._num_candidates > MAX_LOGPROBS:
            fix = f"needs {self._num_candidates} candidates a step; {MAX_LOGPROBS} is the most"
            raise RequestError("beam_width", width, fix)

    @property
    def request(self) -> EngineRequest:
        """The stepped request to add to the engine."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self.params.max_tokens,
            ignore_eos=True,  # the search decides what ends a sequence
            logprobs=self._num_candidates,
            detokenize=False,
        )
        ids, salt = self.prompt_token_ids, self.cache_salt
        return EngineRequest(self.request_id, ids, params, cache_salt=salt, is_stepped=True)

    def update(self, output: SequenceOutput) -> None:
        """Take in candidates of one of this request's sequences.

        Raises:
            EngineDeadError: the engine ended the sequence, which only closing it does.
        """
        if output.finish_reason is FinishReason.ABORT:
            raise EngineDeadError(f"beam search {self.request_id} was aborted")
        if not output.logprobs:
            return
        if not self._beams:
            self._beams[output.seq_id] = _Beam([], 0.0)
        self._beams[output.seq_id].candidates = output.logprobs[0]

    def proceed(self, engine: SteppedEngine) -> None:
        """Choose the next tokens once all live sequences have candidates; else do nothing."""
        if not self._beams or any(beam.candidates is None for beam in self._beams.values()):
            return
        best = self._best_continuations()
        going_on: list[_Continuation] = []
        for rank, item in enumerate(best):
            if not self._ends(item):
                going_on.append(item)
            elif rank < self.params.beam_width:
                self._add_hypothesis(item)
        going_on = going_on[: self.params.beam_width]
        self.is_finished = not going_on or not self._can_improve(going_on[0])
        self._continue(engine, [] if self.is_finished else going_on)

    def output(self, tokenizer: Tokenizer | None) -> BeamSearchOutput:
        """The hypotheses with their texts."""
        for hypothesis in self._hypotheses:
            if tokenizer is not None:
                hypothesis.text = tokenizer.decode(hypothesis.token_ids)
        return BeamSearchOutput(
            self.request_id, self.prompt, self.prompt_token_ids, self._hypotheses
        )

    def _best_continuations(self) -> list[_Continuation]:
        found = [
            _Continuation(seq_id, token_id, beam.cumulative_logprob + entry.logprob)
            for seq_id, beam in self._beams.items()
            for token_id, entry in (beam.candidates or {}).items()
        ]
        found.sort(key=lambda item: -item.cumulative_logprob)
        return found[: self._num_candidates]

    def _length(self) -> int:
        """Generated tokens of the continuations under consideration; the same for all."""
        return len(next(iter(self._beams.values())).token_ids) + 1

    def _ends(self, item: _Continuation) -> bool:
        return item.token_id in self.eos_token_ids or self._length() >= self.params.max_tokens

    def _score(self, cumulative_logprob: float) -> float:
        return cumulative_logprob / math.pow(self._length(), self.params.length_penalty)

    def _add_hypothesis(self, item: _Continuation) -> None:
        is_stopped = item.token_id in self.eos_token_ids
        self._hypotheses.append(
            BeamHypothesis(
                [*self._beams[item.seq_id].token_ids, item.token_id],
                item.cumulative_logprob,
                self._score(item.cumulative_logprob),
                (FinishReason.STOP if is_stopped else FinishReason.LENGTH).value,
            )
        )
        self._hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self._hypotheses[self.params.beam_width :]

    def _can_improve(self, best: _Continuation) -> bool:
        """Whether the best live beam may still enter the finished hypotheses."""
        if len(self._hypotheses) < self.params.beam_width:
            return True
        return self._score(best.cumulative_logprob) > self._hypotheses[-1].score

    def _continue(self, engine: SteppedEngine, chosen: list[_Continuation]) -> None:
        """Make the engine's live sequences those that were chosen."""
        children: dict[int, list[_Continuation]] = {seq_id: [] for seq_id in self._beams}
        for item in chosen:
            children[item.seq_id].append(item)
        for seq_id in (seq_id for seq_id, items in children.items() if not items):
            engine.drop(seq_id)  # first, so that there are never more than beam_width
        beams: dict[int, _Beam] = {}
        for seq_id, items in children.items():
            for at, item in enumerate(items):
                tokens = [*self._beams[seq_id].token_ids, item.token_id]
                is_last = at == len(items) - 1  # the sequence itself goes on after its forks
                child = seq_id if is_last else engine.fork(seq_id, item.token_id)
                if is_last:
                    engine.advance(seq_id, item.token_id)
                beams[child] = _Beam(tokens, item.cumulative_logprob)
        self._beams = beams
