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

    __hash__ = object.__hash__  # members are singletons; Enum's own hashes the name, in Python


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


class MovePriority(enum.IntEnum):
    """Which move goes first when several wait for one link; lower is more urgent."""

    DEMAND = 0  # a sequence waits for the bytes
    SWAP_OUT = 1  # a preempted sequence's blocks; their slots are wanted
    PREFETCH = 2  # wanted soon
    WRITE_BACK = 3  # a copy for later


@dataclass(slots=True, frozen=True)
class Move:
    """Copy one block from a slot of one tier to a slot of another.

    Attributes:
        ticket: its number; results name it.
        key, parent, tokens: the block's identity; `parent` and `tokens` (packed ids) are what a
            persistent tier stores beside the bytes, empty for a private block.
    """

    ticket: int
    key: BlockKey
    parent: BlockKey
    tokens: bytes
    source: TierName
    source_slot: int
    destination: TierName
    destination_slot: int
    priority: MovePriority


class MoveFailure(enum.Enum):
    """Why a move's bytes did not arrive."""

    LOST = "lost"  # the source does not hold the block (any more)
    CORRUPT = "corrupt"  # the source's bytes are not what was written
    IO_ERROR = "io_error"  # a device refused
    NO_SPACE = "no_space"  # the destination's file system is full
    LATE = "late"  # its deadline passed
    UNAVAILABLE = "unavailable"  # the tier is closed or in quarantine


@dataclass(slots=True, frozen=True)
class MoveResult:
    """How a move ended: `failure` is None when all bytes arrived; `seconds` of its own copying."""

    ticket: int
    failure: MoveFailure | None
    seconds: float


@dataclass(slots=True, frozen=True)
class Erasure:
    """How making a slot of the persistent tier empty ended: `failure` is None when what was there
    never comes back."""

    slot: int
    failure: MoveFailure | None


PositionLogprobs = dict[int, Logprob]
"""Candidates at one position: token id -> Logprob; always holds the chosen token."""


@dataclass(slots=True)
class SampledToken:
    """What the sampler decided for one sequence.

    `logprobs` is None unless the request asked for them; with `logprobs=k` it holds the k best
    and the chosen token. `ending` is set when a grammar says that the sequence ends here.
    """

    token_id: int
    logprobs: PositionLogprobs | None = None
    ending: FinishReason | None = None


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


@dataclass(slots=True)
class GivenResults:
    """Results that no device has to be asked for: the simplest `tierkv.protocols.Drawn`.

    Attributes:
        rows: one per row of the plan, in order.
    """

    rows: list[RowResult]

    def results(self) -> list[RowResult]:
        """All rows."""
        return self.rows
