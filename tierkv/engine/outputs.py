"""What the engine emits each step (token ids only), and what a user gets (with text)."""

from __future__ import annotations

from dataclasses import dataclass, field

from tierkv.types import FinishReason, PositionLogprobs


@dataclass(slots=True)
class SequenceOutput:
    """News of one sequence after a step; crosses the process border as is.

    Attributes:
        index: which of the request's `n` samples (candidates of a beam step have their seq_id).
        new_token_ids: tokens generated since the last output; may be empty.
        logprobs: one entry per new token when asked for.
        finish_reason: set once, on the last output of the sequence.
        stop_reason: the stop token id that ended it, None for EOS, length or abort.
    """

    request_id: str
    seq_id: int
    index: int
    new_token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None
    prompt_sources: PromptSources | None = None


@dataclass(slots=True)
class PromptSources:
    """Tokens of a prompt whose KV was reused, by the tier that had it; the others were computed.

    What a prefetch or another request had brought into the pool before counts as the pool's.
    """

    gpu: int = 0
    cpu: int = 0
    nvme: int = 0

    def add(self, other: PromptSources) -> None:
        """Count another prompt's too."""
        self.gpu += other.gpu
        self.cpu += other.cpu
        self.nvme += other.nvme

    def lose(self, num_tokens: int) -> None:
        """So many of them could not be loaded after all."""
        for tier in ("nvme", "cpu", "gpu"):
            lost = min(num_tokens, getattr(self, tier))
            setattr(self, tier, getattr(self, tier) - lost)
            num_tokens -= lost


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request on the engine's clock, in seconds; None until it happened."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` answers to a prompt (vLLM's shape).

    `finish_reason` is "stop", "length", "abort" or None while running; `stop_reason` is the stop
    string or stop token id that ended it, None for end-of-sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request: its prompt and the answers so far (vLLM's shape).

    Attributes:
        prompt_logprobs: one entry per prompt position, None for the first, when asked for.
        outputs: one per parallel sample, in order of `index`.
        num_cached_tokens: prompt tokens whose KV was reused instead of computed.
        prompt_sources: the same, by tier.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = field(default=None)
    prompt_sources: PromptSources | None = None
