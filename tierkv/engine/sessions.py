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


class _Named(OrderedDict[str, Session]):
    """One tenant's sessions, the one used least recently first; `num_keys` of all of them."""

    num_keys = 0


class Sessions:
    """Sessions by tenant and name.

    When there are too many, or they have too many keys, the tenant that has most of that forgets
    the one that it used least recently: nobody makes others' sessions be forgotten.
    """

    def __init__(self, most_keys: int = _MOST_KEYS, most_sessions: int = _MOST_SESSIONS) -> None:
        self._most_keys, self._most_sessions = most_keys, most_sessions
        self._num_keys = self._num_sessions = 0
        self._tenants: dict[str, _Named] = {}

    def __len__(self) -> int:
        return self._num_sessions

    def count(self, tenant: str) -> int:
        """How many a tenant has."""
        return len(self._tenants.get(tenant, ()))

    def begun(self, tenant: str, name: str) -> int:
        """A request of the session has come; returns its number, from 1."""
        session = self._session(tenant, name)
        self._tenants[tenant].move_to_end(name)
        session.num_requests += 1
        self._forget()
        return session.num_requests

    def ended(self, tenant: str, name: str, salt: str, keys: list[BlockKey]) -> None:
        """A request of the session is over, and these were its blocks."""
        session = self._session(tenant, name)
        self._note_keys(self._tenants[tenant], len(keys) - len(session.keys))
        session.salt, session.keys = salt, keys
        self._forget()

    def find(self, tenant: str, name: str) -> Session | None:
        sessions = self._tenants.get(tenant)
        return None if sessions is None else sessions.get(name)

    def _session(self, tenant: str, name: str) -> Session:
        sessions = self._tenants.setdefault(tenant, _Named())
        self._num_sessions += name not in sessions
        return sessions.setdefault(name, Session())

    def _note_keys(self, sessions: _Named, change: int) -> None:
        sessions.num_keys += change
        self._num_keys += change

    def _forget(self) -> None:
        while self._num_keys > self._most_keys:
            self._forget_one(max(self._tenants, key=lambda name: self._tenants[name].num_keys))
        while self._num_sessions > self._most_sessions:
            self._forget_one(max(self._tenants, key=lambda name: len(self._tenants[name])))

    def _forget_one(self, tenant: str) -> None:
        sessions = self._tenants[tenant]
        _, session = sessions.popitem(last=False)
        self._num_sessions -= 1
        self._note_keys(sessions, -len(session.keys))
        if not sessions:
            del self._tenants[tenant]
