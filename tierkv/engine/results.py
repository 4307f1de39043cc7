"""What a step's results become for the front end: news of a sequence."""

from __future__ import annotations

from tierkv.engine.outputs import RequestMetrics, SequenceOutput
from tierkv.engine.plan import PlanRow
from tierkv.engine.request import Request, Sequence
from tierkv.types import PositionLogprobs, RowResult


def news(
    seq: Sequence, new_token_ids: list[int], logprobs: list[PositionLogprobs] | None = None
) -> SequenceOutput:
    """New tokens of a sequence; all else as it stands."""
    output = SequenceOutput(seq.request.request_id, seq.seq_id, seq.index, new_token_ids, logprobs)
    output.num_cached_tokens = seq.request.num_cached_tokens
    output.prompt_sources = seq.request.prompt_sources
    return output


def final_news(output: SequenceOutput, seq: Sequence, now: float) -> SequenceOutput:
    """`output` with the last word on its sequence."""
    output.finish_reason, output.stop_reason = seq.finish_reason, seq.stop_reason
    output.metrics = times(seq.request, now)
    return output


def times(request: Request, finished_s: float | None = None) -> RequestMetrics:
    """The request's times as far as they are known."""
    return RequestMetrics(
        request.arrival_s,
        request.first_scheduled_s,
        request.first_token_s,
        finished_s,
        request.num_preemptions,
    )


def fresh_prompt_logprobs(row: PlanRow, result: RowResult) -> list[PositionLogprobs]:
    """What was not sent before; a preempted prompt is computed twice."""
    request: Request = row.seq.request
    fresh = result.prompt_logprobs[max(0, request.num_prompt_logprobs - row.start) :]
    request.num_prompt_logprobs += len(fresh)
    return fresh


def candidates(seq: Sequence, result: RowResult) -> SequenceOutput:
    """The most likely next tokens of a stepped sequence, for its caller to choose from."""
    output = news(seq, [])
    output.logprobs = [sample.logprobs for sample in result.samples if sample.logprobs is not None]
    return output
