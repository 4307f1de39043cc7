"""From the engine's token ids to what a user sees: text, stop strings, log-probabilities."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tierkv.engine.core import EngineRequest
from tierkv.engine.detokenizer import StopStrings, make_detokenizer
from tierkv.engine.outputs import (
    CompletionOutput,
    PromptSources,
    RequestMetrics,
    RequestOutput,
    SequenceOutput,
)
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import RequestError
from tierkv.types import FinishReason, PositionLogprobs


@dataclass(slots=True, frozen=True)
class StopCommand:
    """The engine shall end this sequence: its text holds a stop string."""

    request_id: str
    index: int


class SequenceState:
    """The answer so far of one of a request's samples.

    `text`, `token_ids` and `logprobs` only grow; `text` lags behind the tokens by what may yet
    become a stop string or is half a character.
    """

    def __init__(
        self, index: int, params: SamplingParams, tokenizer: Tokenizer | None, prompt: list[int]
    ) -> None:
        self.index = index
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = make_detokenizer(tokenizer, params, prompt)
        self._stops = StopStrings(list(params.stop), include=params.include_stop_str_in_output)
        self._taken = (0, 0, False)  # tokens, characters and end that deltas have delivered

    def update(self, news: SequenceOutput) -> bool:
        """Take in an output of the engine; True when a stop string ends the sequence here."""
        is_stopped_by_token = news.finish_reason is FinishReason.STOP
        last = len(news.new_token_ids) - 1
        for i, token_id in enumerate(news.new_token_ids):
            self._add_token(token_id, news.logprobs[i] if news.logprobs else None)
            # The token that stops a sequence is no part of its text unless asked for.
            if is_stopped_by_token and i == last and not self._params.include_stop_str_in_output:
                continue
            if self._add_text(token_id):
                return news.finish_reason is None or i < last
        if news.finish_reason is not None:
            self.finish(news.finish_reason, news.stop_reason)
        return False

    def _add_token(self, token_id: int, logprobs: PositionLogprobs | None) -> None:
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.cumulative_logprob += logprobs[token_id].logprob
            self.logprobs.append(with_texts(logprobs, self._tokenizer))

    def _add_text(self, token_id: int) -> bool:
        """Whether a stop string was found; the sequence is then finished."""
        if self._detokenizer is None:
            return False
        is_armed = len(self.token_ids) >= self._params.min_tokens
        text, stop = self._stops.push(self._detokenizer.push(token_id), is_armed=is_armed)
        self.text += text
        if stop is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, stop
        return stop is not None

    def finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        """The engine ended the sequence: nothing is held back any longer."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._detokenizer is not None:
            text, _ = self._stops.push(self._detokenizer.flush(), is_armed=True)
            self.text += text + self._stops.flush()

    def completion(self) -> CompletionOutput:
        """All of the answer so far."""
        return self._completion(0, 0)

    def take_delta(self) -> CompletionOutput | None:
        """What came since the last call; None when nothing did."""
        before = self._taken
        self._taken = (len(self.token_ids), len(self.text), self.finish_reason is not None)
        return self._completion(*before[:2]) if self._taken != before else None

    def _completion(self, first_token: int, first_character: int) -> CompletionOutput:
        wants_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text[first_character:],
            token_ids=self.token_ids[first_token:],
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=self.logprobs[first_token:] if wants_logprobs else None,
            finish_reason=self.finish_reason.value if self.finish_reason else None,
            stop_reason=self.stop_reason,
        )


class RequestState:
    """A request in the front end: its prompt, and the state of each of its samples.

    Attributes:
        request_id: as the engine knows it.
        shown_id: as its outputs name it.
        num_updates: how often there was news.
    """

    def __init__(
        self,
        request: EngineRequest,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        shown_id: str,
    ) -> None:
        params, ids = request.params, request.prompt_token_ids
        self.request_id = request.request_id
        self.shown_id = shown_id
        self.prompt = prompt
        self.prompt_token_ids = ids
        self.sequences = [SequenceState(i, params, tokenizer, ids) for i in range(params.n)]
        self.num_cached_tokens: int | None = None
        self.prompt_sources: PromptSources | None = None
        self.metrics: RequestMetrics | None = None
        self.num_updates = 0
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]  # nothing predicts the first token

    @property
    def is_finished(self) -> bool:
        return all(seq.finish_reason is not None for seq in self.sequences)

    def update(self, news: SequenceOutput) -> bool:
        """Take in an output of the engine; True when a stop string ends its sequence here."""
        self.num_updates += 1
        if news.num_cached_tokens is not None:
            self.num_cached_tokens = news.num_cached_tokens
            self.prompt_sources = news.prompt_sources
        if news.metrics is not None:
            self.metrics = news.metrics
        if news.prompt_logprobs and self._prompt_logprobs is not None:
            entries = [with_texts(entry, self._tokenizer) for entry in news.prompt_logprobs]
            self._prompt_logprobs.extend(entries)
        if news.finish_reason is FinishReason.ABORT:
            self._abort()
            return False
        seq = self.sequences[news.index]
        # After a stop string was found here, the engine may still have sent a step's output.
        return seq.finish_reason is None and seq.update(news)

    def _abort(self) -> None:
        """The whole request is aborted: its samples that are not yet forked have no output."""
        for seq in self.sequences:
            if seq.finish_reason is None:
                seq.finish(FinishReason.ABORT, None)

    def output(self) -> RequestOutput:
        """Everything so far; what the caller does with it does not reach this state."""
        return self._output([seq.completion() for seq in self.sequences])

    def take_delta(self) -> RequestOutput:
        """What came since the last call; samples without news are left out."""
        deltas = [seq.take_delta() for seq in self.sequences]
        return self._output([delta for delta in deltas if delta is not None])

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.shown_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.is_finished,
            prompt_logprobs=list(self._prompt_logprobs) if self._prompt_logprobs else None,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
            prompt_sources=self.prompt_sources,
        )


class OutputProcessor:
    """The states of all requests in flight, and the routing of the engine's outputs to them."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def add(
        self, request: EngineRequest, prompt: str | None, *, shown_id: str | None = None
    ) -> RequestState:
        """A state for `request`, kept until it finishes or is forgotten.

        Raises:
            RequestError: a request of this id is in flight, or it needs a tokenizer.
        """
        if request.request_id in self._states:
            raise RequestError("request_id", request.request_id, "is in use by a live request")
        if request.params.stop and self._tokenizer is None:
            fix = "the model has no tokenizer: use stop_token_ids"
            raise RequestError("stop", request.params.stop, fix)
        shown_id = request.request_id if shown_id is None else shown_id
        state = RequestState(request, prompt, self._tokenizer, shown_id)
        self._states[request.request_id] = state
        return state

    def forget(self, request_id: str) -> None:
        """Drop a request; further outputs of it are ignored, unknown ids too."""
        self._states.pop(request_id, None)

    def process(
        self, outputs: list[SequenceOutput]
    ) -> tuple[list[RequestState], list[StopCommand]]:
        """Take in the outputs of one step.

        Returns:
            The states with news, each once, and the sequences that the engine must stop.
            Finished requests are forgotten here.
        """
        changed: dict[str, RequestState] = {}
        stops: list[StopCommand] = []
        for news in outputs:
            state = self._states.get(news.request_id)
            if state is None:
                continue
            changed[news.request_id] = state
            if state.update(news):
                stops.append(StopCommand(news.request_id, news.index))
        for request_id, state in changed.items():
            if state.is_finished:
                del self._states[request_id]
        return list(changed.values()), stops


def with_texts(logprobs: PositionLogprobs, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """The same candidates with their texts filled in."""
    if tokenizer is None:
        return logprobs
    return {
        token_id: dataclasses.replace(entry, decoded_token=tokenizer.token_text(token_id))
        for token_id, entry in logprobs.items()
    }
