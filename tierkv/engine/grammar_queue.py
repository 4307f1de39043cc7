"""Requests that wait for their grammar while the engine goes on with others."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

from tierkv.engine.core import EngineRequest
from tierkv.engine.grammar import COMPILE_S, Grammar, GrammarCompiler, too_slow
from tierkv.errors import RequestError


class _Entry(NamedTuple):
    request: EngineRequest
    grammar: Future[Grammar]
    deadline: float


class GrammarQueue:
    """Holds each request until its grammar is compiled, refused or late.

    Args:
        compiler: the engine's; None when it has none.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._waiting: dict[str, _Entry] = {}

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def add(self, request: EngineRequest) -> bool:
        """Keep the request if it has to wait; False when it need not."""
        wanted = request.params.structured_outputs
        if wanted is None or self._compiler is None:
            return False
        deadline = time.monotonic() + COMPILE_S
        entry = _Entry(request, self._compiler.begin(wanted), deadline)
        self._waiting[request.request_id] = entry
        return True

    def discard(self, request_ids: Iterable[str]) -> list[str]:
        """Drop requests; returns the ids of those that were here."""
        return [i for i in request_ids if self._waiting.pop(i, None) is not None]

    def take(self) -> Iterator[tuple[EngineRequest, Grammar | RequestError]]:
        """The requests that wait no longer, each with its grammar or why it has none."""
        now = time.monotonic()
        for request_id, entry in list(self._waiting.items()):
            if entry.grammar.done() or now > entry.deadline:
                del self._waiting[request_id]
                yield entry.request, _result(entry)


def _result(entry: _Entry) -> Grammar | RequestError:
    wanted = entry.request.params.structured_outputs
    assert wanted is not None
    if not entry.grammar.done():
        return too_slow(wanted)
    try:
        return entry.grammar.result()
    except RequestError as error:
        return error
