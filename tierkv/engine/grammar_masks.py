"""Grammars in the sampler: one matcher per sequence, and their masks over the logits of a step.

A matcher follows the tokens that its sequence generated, as they were committed, so that neither
a preemption nor a fork needs to tell it anything.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tierkv.model.inputs import to_device
from tierkv.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from llguidance import LLExecutor, LLMatcher

    from tierkv.engine.grammar import Grammar
    from tierkv.engine.request import Sequence

logger = logging.getLogger(__name__)

_NEVER = float("-inf")


class _Follower:
    """A sequence's matcher, and how many of its tokens it has read."""

    __slots__ = ("grammar", "matcher", "num_read")

    def __init__(self, grammar: Grammar, seq: Sequence) -> None:
        self.grammar = grammar
        self.matcher: LLMatcher = grammar.start()
        self.num_read = seq.num_prompt_tokens

    def read(self, seq: Sequence) -> None:
        """Take in what was generated since the last call."""
        self.matcher.consume_tokens(seq.token_ids[self.num_read :])
        self.num_read = len(seq.token_ids)


class GrammarMasks:
    """The matchers of all sequences with a grammar."""

    def __init__(self) -> None:
        self._followers: dict[int, _Follower] = {}
        self._executor: LLExecutor | None = None

    @property
    def is_empty(self) -> bool:
        return not self._followers

    def add(self, seq: Sequence, grammar: Grammar) -> None:
        """Follow a sequence from now on; a fork starts from its own tokens."""
        self._followers[seq.seq_id] = _Follower(grammar, seq)

    def forget(self, seq_id: int) -> None:
        """The sequence is finished; unknown ids are ignored."""
        self._followers.pop(seq_id, None)

    def mask(self, logits: Tensor, rows: Seq[int], seqs: Seq[Sequence]) -> Tensor:
        """A copy of the logits in which what a grammar forbids is -inf.

        Args:
            logits: `[num_rows, vocab]`.
            rows, seqs: the rows of sequences with a grammar, and the sequences.
        """
        followers = [self._followers[seq.seq_id] for seq in seqs]
        for follower, seq in zip(followers, seqs, strict=True):
            follower.read(seq)
        bits = self._compute([f.matcher for f in followers], followers[0].grammar.num_words)
        vocab = logits.shape[-1]
        forbidden = np.unpackbits(~bits.view(np.uint8), axis=1, count=vocab, bitorder="little")
        mask = to_device(torch.from_numpy(forbidden).view(torch.bool), logits.device)
        masked = logits.clone()
        if len(rows) == logits.shape[0]:
            return masked.masked_fill_(mask, _NEVER)
        at = to_device(torch.tensor(rows), logits.device)
        masked[at] = masked[at].masked_fill(mask, _NEVER)
        return masked

    def _compute(self, matchers: list[LLMatcher], num_words: int) -> np.ndarray:
        """One mask per matcher, `[num_matchers, num_words]` of int32, in parallel."""
        bits = np.full((len(matchers), num_words), -1, np.int32)
        if len(matchers) == 1:
            matchers[0].unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            return bits
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        places = [(matcher, i) for i, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(places, bits.ctypes.data, num_words * 4, len(places))
        return bits

    def ending(self, seq: Sequence, token_id: int) -> FinishReason | None:
        """Whether this token, drawn under the last mask, ends the sequence.

        A grammar that came to one of its limits aborts it: what is there is not what was asked.
        """
        follower = self._followers[seq.seq_id]
        if follower.matcher.is_error():
            error = follower.matcher.get_error().partition("\n")[0]
            logger.warning("request %s: its grammar failed: %s", seq.request.request_id, error)
            return FinishReason.ABORT
        return FinishReason.STOP if token_id in follower.grammar.eos_token_ids else None
