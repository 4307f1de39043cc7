"""Which blocks belong to which session, for pinning and export: in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from tierkv.types import BlockKey

_MOST_KEYS = 1 << 20
_MOST_SESSIONS = 1 << 16


@dataclass(slots=True)
class Session:
    """What is known of one session.

    Attributes:
        salt, keys: of its last request that ended: the chain of its full blocks, root first.
        num_requests: begun so far.
    """

    salt: str = ""
    keys: list[BlockKey] = field(default_factory=list)
    num_requests: int = 0


class Sessions:
    """Sessions by tenant and name; those that were used least recently are forgotten."""

    def __init__(self, most_keys: int = _MOST_KEYS) -> None:
        self._most_keys = most_keys
        self._num_keys = 0
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def begun(self, tenant: str, name: str) -> int:
        """A request of the session has come; returns its number, from 1."""
        session = self._sessions.setdefault((tenant, name), Session())
        self._sessions.move_to_end((tenant, name))
        session.num_requests += 1
        self._forget()
        return session.num_requests

    def ended(self, tenant: str, name: str, salt: str, keys: list[BlockKey]) -> None:
        """A request of the session is over, and these were its blocks."""
        session = self._sessions.setdefault((tenant, name), Session())
        self._num_keys += len(keys) - len(session.keys)
        session.salt, session.keys = salt, keys
        self._forget()

    def find(self, tenant: str, name: str) -> Session | None:
        return self._sessions.get((tenant, name))

    def _forget(self) -> None:
        while self._num_keys > self._most_keys or len(self._sessions) > _MOST_SESSIONS:
            _, session = self._sessions.popitem(last=False)
            self._num_keys -= len(session.keys)
