"""What is remembered of a request while it is served: for its log line, its metrics, its spans."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")


@dataclass(slots=True)
class Generation:
    """What became of one engine request; times in seconds from its arrival.

    Attributes:
        reply_id: its id as replies show it.
        finish_reasons: one for each sample; `error` when the engine refused it or died.
        queue_s: until its first step, None if it had none.
        first_token_s: until its first token, None if it had none.
        latency_s: until it ended.
    """

    reply_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    finish_reasons: list[str]
    queue_s: float | None
    first_token_s: float | None
    latency_s: float


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request.

    Attributes:
        request_id: the client's `X-Request-Id` if it sent a sane one, else made up.
        route: the path as routes spell it (`/v1/models/{name:path}`).
        status: of the response; 0 before it begins.
        generations: its engine requests that have ended.
        span: its trace span, if there are traces.
    """

    request_id: str
    method: str
    path: str
    begun_s: float = field(default_factory=time.perf_counter)
    route: str = "unknown"
    status: int = 0
    generations: list[Generation] = field(default_factory=list)
    span: Any = None

    def log_fields(self) -> dict[str, Any]:
        """What the request's log line says besides its message."""
        found: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration_s": round(time.perf_counter() - self.begun_s, 4),
        }
        if self.generations:
            found |= _totals(self.generations)
        return found


current: ContextVar[RequestRecord | None] = ContextVar("current", default=None)
"""The record of the HTTP request that the current task serves."""


def _totals(generations: list[Generation]) -> dict[str, Any]:
    firsts = [g.first_token_s for g in generations if g.first_token_s is not None]
    return {
        "prompt_tokens": sum(g.num_prompt_tokens for g in generations),
        "cached_tokens": sum(g.num_cached_tokens for g in generations),
        "generated_tokens": sum(g.num_generated_tokens for g in generations),
        "first_token_s": round(min(firsts), 4) if firsts else None,
        "finish": ",".join(reason for g in generations for reason in g.finish_reasons),
    }


def request_id_from(given: str | None) -> str:
    """The id that a client chose, if it can go into headers and logs as it is; else a new one."""
    return given if given and _SANE_ID.fullmatch(given) else uuid.uuid4().hex
