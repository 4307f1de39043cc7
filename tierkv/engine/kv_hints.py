"""What a request says of its own KV: how long it is wanted, by whom, and whether at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tierkv.errors import RequestError

MOST_PRIORITY = 100
_MOST_SESSION_BYTES = 256
_MOST_TTL_S = sys.float_info.max
_TURNS = ("", "end", "tool_call")


@dataclass(slots=True, frozen=True)
class KvHints:
    """Hints of one request; none of them changes what it answers.

    Attributes:
        ttl: seconds after its end after which blocks that only requests with a `ttl` used are the
            first to be evicted; None for never.
        priority: what is kept longer, in [-100, 100]: a block leaves a tier before those of higher
            priority. (The request's own `priority` says who runs first.)
        no_store: nothing of it is kept for others, in any tier. It may use what is there.
        session_id: names its blocks, for pinning and export; at most 256 bytes.
        turn: what the client will do with the answer: "tool_call" when the next turn comes at
            once, "end" when it is a person's, "" when unknown.

    Raises:
        RequestError: a value is out of range; names the field, the value and the fix.
    """

    ttl: float | None = None
    priority: int = 0
    no_store: bool = False
    session_id: str = ""
    turn: str = ""

    def __post_init__(self) -> None:
        check_ttl(self.ttl, "kv_hints.ttl")
        if type(self.priority) is not int or abs(self.priority) > MOST_PRIORITY:
            fix = f"must be a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}"
            raise RequestError("kv_hints.priority", self.priority, fix)
        if type(self.no_store) is not bool:
            raise RequestError("kv_hints.no_store", self.no_store, "must be true or false")
        check_session(self.session_id, "kv_hints.session_id")
        if self.turn not in _TURNS:
            raise RequestError("kv_hints.turn", self.turn, 'must be "end" or "tool_call"')

    @classmethod
    def parse(cls, values: Hints) -> KvHints | None:
        """Hints as users give them; None when there are none."""
        if values is None or isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise RequestError("kv_hints", values, "must be an object")
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                fix = f"is no hint; known are {', '.join(known)}"
                raise RequestError(f"kv_hints.{name}", values[name], fix)
        hints = cls(**{name: value for name, value in values.items() if value is not None})
        return None if hints == cls() else hints


def parse_each(values: Hints | list[Hints], count: int) -> list[KvHints | None]:
    """Hints for `count` prompts: one for all, or one for each."""
    if not isinstance(values, list):
        return [KvHints.parse(values)] * count
    if len(values) != count:
        fix = f"{len(values)} were given for {count} prompts: give one for all, or one for each"
        raise RequestError("kv_hints", f"<list of {len(values)}>", fix)
    return [KvHints.parse(each) for each in values]


Hints = KvHints | Mapping[str, Any] | None
"""Hints as users give them."""


def check_ttl(value: Any, field: str) -> None:
    """Raise RequestError unless it is a time to live in seconds, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= _MOST_TTL_S):
        raise RequestError(field, value, "must be a number of seconds of at least 0")


def check_session(value: object, field: str) -> None:
    """Raise RequestError unless it can name a session."""
    try:
        is_short = isinstance(value, str) and len(value.encode()) <= _MOST_SESSION_BYTES
    except UnicodeEncodeError:
        is_short = False
    if not is_short:
        raise RequestError(field, value, f"must be text of at most {_MOST_SESSION_BYTES} bytes")
