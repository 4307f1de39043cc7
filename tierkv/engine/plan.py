"""A step's plan: what the scheduler decided, and all that the executor needs to do it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierkv.types import BlockCopy, Move

if TYPE_CHECKING:
    from tierkv.engine.request import Sequence
    from tierkv.protocols import Drawn


class PlanRow:
    """One sequence's share of a step: tokens `[start, start + num_tokens)` get their KV computed.

    Attributes:
        seq: the sequence; its `token_ids[start:start + num_tokens]` are the input tokens and its
            `block_table` (list of GPU block ids, one per logical block; entries behind a sliding
            window are 0 and must not be read) says where their KV goes.
        start: position of the first input token = tokens already in KV.
        num_tokens: input tokens of this row, >= 1.
        num_samples: tokens to draw from the last row's logits: 0 in the middle of a prompt, 1
            normally, n when a prompt ends and the request wants n parallel samples.
        num_logit_rows: how many of the row's last positions need logits: 0, 1, or all of them
            when the request wants prompt logprobs.
        epoch: `seq.epoch` when planned; a later preemption makes it stale.
    """

    __slots__ = ("seq", "start", "num_tokens", "num_samples", "num_logit_rows", "epoch")

    def __init__(
        self, seq: Sequence, start: int, num_tokens: int, num_samples: int, num_logit_rows: int
    ) -> None:
        self.seq = seq
        self.start = start
        self.num_tokens = num_tokens
        self.num_samples = num_samples
        self.num_logit_rows = num_logit_rows
        self.epoch = seq.epoch


@dataclass(slots=True)
class Plan:
    """One step. `moves` start in the background; `copies` run before the forward; rows are packed
    in order into one batch.

    `num_tokens` is the sum over rows. Logits come back as one `[sum(num_logit_rows), vocab]`
    tensor in row order. `unread` is what the step before drew, if the host has not read it yet: a
    row whose token is not in `seq.token_ids` takes it from there.
    """

    rows: list[PlanRow] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    num_tokens: int = 0
    unread: Drawn | None = None

    @property
    def is_empty(self) -> bool:
        return not self.rows
