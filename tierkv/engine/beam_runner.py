"""Beam searches inside an engine process: their steps stay here, their results leave as outputs.

A search for `beam_width` hypotheses looks to the front end like a request for as many samples, all
of which end at once.
"""

from __future__ import annotations

import dataclasses

from tierkv.engine import results
from tierkv.engine.beam import BeamSearch
from tierkv.engine.capacity import check_parallel
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.outputs import SequenceOutput
from tierkv.engine.request import Request
from tierkv.types import FinishReason


class BeamRunner:
    """The searches in flight in one engine."""

    def __init__(self, engine: EngineCore) -> None:
        self._engine = engine
        self._searches: dict[str, BeamSearch] = {}
        self._requests: dict[str, Request] = {}

    def add(self, request: EngineRequest) -> None:
        """Begin the search that `request.beam` describes.

        Raises:
            RequestError: what the engine refuses, or more beams than it runs sequences.
        """
        assert request.beam is not None
        limit = self._engine.scheduler.max_num_seqs
        check_parallel("beam_width", request.beam.beam_width, limit)
        info, ids = self._engine.info, request.prompt_token_ids
        room = max(1, info.max_model_len - len(ids))
        search = BeamSearch(
            request.request_id,
            None,
            ids,
            dataclasses.replace(request.beam, max_tokens=min(request.beam.max_tokens, room)),
            frozenset(info.eos_token_ids),
            request.cache_salt,
        )
        params = search.request.params
        stepped = dataclasses.replace(request, params=params, is_stepped=True, beam=None)
        self._engine.add_request(stepped)
        self._searches[request.request_id] = search
        self._requests[request.request_id] = self._engine.scheduler.requests[request.request_id]

    def advance(self, outputs: list[SequenceOutput]) -> list[SequenceOutput]:
        """The outputs of a step with those of searches taken in, and the results of those that
        ended."""
        if not self._searches:
            return outputs
        shown = [output for output in outputs if not self._take(output)]
        for request_id, search in list(self._searches.items()):
            search.proceed(self._engine)
            if search.is_finished:
                shown.extend(self._results(request_id))
        return shown

    def _take(self, output: SequenceOutput) -> bool:
        """Whether the output is an inner step of a search."""
        search = self._searches.get(output.request_id)
        if search is None:
            return False
        if output.finish_reason is FinishReason.ABORT:
            self._forget(output.request_id)
            return False
        search.update(output)
        return True

    def _results(self, request_id: str) -> list[SequenceOutput]:
        search, request = self._searches[request_id], self._requests[request_id]
        self._forget(request_id)
        times = results.times(request, self._engine.scheduler.timeline.now())
        return [
            SequenceOutput(
                request_id,
                index,
                index,
                found.token_ids,
                finish_reason=FinishReason(found.finish_reason),
                num_cached_tokens=request.num_cached_tokens,
                metrics=times,
                prompt_sources=request.prompt_sources,
            )
            for index, found in enumerate(search.output(None).sequences)
        ]

    def _forget(self, request_id: str) -> None:
        del self._searches[request_id], self._requests[request_id]
