"""Log-probabilities of the best candidates and of chosen tokens, found on the device at once and
read when they are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierkv.engine.sampler_filters import NEVER, ids
from tierkv.engine.sampler_unread import HostCopy
from tierkv.types import Logprob, PositionLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tierkv.engine.plan import PlanRow

_PROMPT_ROWS_AT_ONCE = 128  # bounds the scratch memory


class UnreadLogprobs:
    """Of some rows of logits.

    Args:
        raw: fp32 `[rows, vocab]`; not wanted any more afterwards.
        counts: candidates of each row.
        chosen: int64 `[rows, width]` on the device, tokens of each row.
    """

    def __init__(self, raw: Tensor, counts: list[int], chosen: Tensor) -> None:
        norm = raw.logsumexp(-1, keepdim=True)
        best, tokens = raw.topk(min(max(counts), raw.shape[-1]))
        values = raw.gather(1, chosen)
        # Tied tokens share the best rank.
        ranks = [
            (raw > column.unsqueeze(1)).sum(-1, keepdim=True) + 1 for column in values.unbind(1)
        ]
        self._counts, self._num_best = counts, best.shape[1]
        self._logprobs = HostCopy(torch.cat([best, values], 1) - norm)
        self._numbers = HostCopy(torch.cat([tokens, *ranks], 1))

    def read(self, chosen: Seq[Seq[int]]) -> list[list[PositionLogprobs]]:
        """For each row and each token chosen from it: the best candidates, then that token.

        Args:
            chosen: the first tokens of each row.
        """
        found, split = [], self._num_best
        rows = zip(self._counts, self._logprobs.read(), self._numbers.read(), chosen, strict=True)
        for count, logprobs, numbers, tokens in rows:
            best = {
                token: Logprob(logprob, rank)
                for rank, (token, logprob) in enumerate(
                    zip(numbers[:count], logprobs[: min(count, split)], strict=False), 1
                )
                if logprob > NEVER  # a grammar forbids the others
            }
            others = zip(tokens, logprobs[split:], numbers[split:], strict=False)
            found.append(
                [
                    best if token in best else {**best, token: Logprob(logprob, rank)}
                    for token, logprob, rank in others
                ]
            )
        return found


class UnreadPromptLogprobs:
    """Of the positions of a plan's row whose successor is a prompt token.

    Args:
        logits: `[row.num_tokens, vocab]`; row j predicts position `row.start + j + 1`.
        row: the row.
    """

    def __init__(self, logits: Tensor, row: PlanRow) -> None:
        seq = row.seq
        end = min(row.start + 1 + row.num_tokens, seq.num_prompt_tokens)
        targets = seq.token_ids[row.start + 1 : end]
        count = seq.request.params.prompt_logprobs or 0
        starts = range(0, len(targets), _PROMPT_ROWS_AT_ONCE)
        self._parts = [targets[start : start + _PROMPT_ROWS_AT_ONCE] for start in starts]
        self._unread = [
            UnreadLogprobs(
                logits[start : start + len(part)],
                [count] * len(part),
                ids(part, logits).unsqueeze(1),
            )
            for start, part in zip(starts, self._parts, strict=True)
        ]

    def read(self) -> list[PositionLogprobs]:
        """One entry per position, in order."""
        return [
            entry
            for unread, part in zip(self._unread, self._parts, strict=True)
            for (entry,) in unread.read([[token] for token in part])
        ]
