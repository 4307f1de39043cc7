"""Words that every room shares. Standard library only."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

BlockKey = bytes
"""blake2b-128 of a full block's content and ancestry, or a random id of a private tail."""


class TierName(enum.Enum):
    """The tiers in the order from hot to cold."""

    GPU = "gpu"
    CPU = "cpu"
    NVME = "nvme"


class FinishReason(enum.Enum):
    """Why a sequence ended (values as in the OpenAI API, plus `abort`)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(slots=True, frozen=True)
class Logprob:
    """Log-probability (natural log) of one candidate token and its rank (1 = most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True, frozen=True)
class BlockCopy:
    """Copy the first `num_tokens` tokens of GPU block `source` to `destination` (all layers)."""

    source: int
    destination: int
    num_tokens: int


PositionLogprobs = dict[int, Logprob]
"""Candidates at one position: token id -> Logprob; always holds the chosen token."""


@dataclass(slots=True)
class SampledToken:
    """What the sampler decided for one sequence.

    `logprobs` is None unless the request asked for them; with `logprobs=k` it holds the k best
    and the chosen token.
    """

    token_id: int
    logprobs: PositionLogprobs | None = None


@dataclass(slots=True)
class RowResult:
    """The sampler's answer for one row of a plan.

    Attributes:
        samples: `num_samples` tokens (one unless the row forks into parallel samples; none when
            the row is a chunk in the middle of a prompt).
        prompt_logprobs: one entry per prompt position of the chunk whose successor is known, in
            order, when the request asked for prompt logprobs.
    """

    samples: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
