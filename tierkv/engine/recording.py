"""What requests came, for a trace: lengths and hashed block ids, no token and no text.

A recording has a key of its own, drawn at random and never told: what leaves the engine of a block
is blake2b-64 of its block key under that key. Equal prefixes have equal ids within one recording,
and nothing can be guessed from them. Names of sessions and tenants are hashed the same way.

A request is noted when it ends, so records come in the order of their ends. None that has arrived
before `until_s` of an answer is still to come. Noted are requests that arrived since the start;
what the engine refuses is not.

Records wait until they are taken, in bounded memory: what finds no room is counted. A recording
that nobody takes from ends by itself.
"""

from __future__ import annotations

import secrets
from collections import deque
from hashlib import blake2b
from typing import Any

from tierkv.cache.hashing import extend_keys
from tierkv.cache.tiered_cache import TieredCache
from tierkv.engine.request import Request
from tierkv.engine.scheduler import Scheduler
from tierkv.errors import ConflictError, NotFoundError
from tierkv.protocols import Clock
from tierkv.types import FinishReason

ID_BYTES = 8
MOST_WAITING_BYTES = 64 << 20
MOST_TAKEN_BYTES = 4 << 20
PATIENCE_S = 60.0
_RECORD_BYTES = 512  # of a record, without its ids


class Recorder:
    """Recordings, one at a time.

    Args:
        cache, scheduler, clock: of the engine.
        most_bytes: of records that wait to be taken.
    """

    def __init__(
        self,
        cache: TieredCache,
        scheduler: Scheduler,
        clock: Clock,
        most_bytes: int = MOST_WAITING_BYTES,
    ) -> None:
        self._cache, self._scheduler, self._clock = cache, scheduler, clock
        self._most_bytes = most_bytes
        self._secret = b""
        self._name = ""
        self._start_s = self._taken_s = 0.0
        self._waiting: deque[dict[str, Any]] = deque()
        self._num_bytes = self._num_dropped = 0

    @property
    def is_on(self) -> bool:
        return bool(self._name)

    # ------------------------------------------------------------------ calls

    def start(self) -> dict[str, Any]:
        """Begin to record; the answer's `recording` names it in the other calls.

        Raises:
            ConflictError: another one is going on.
        """
        now = self._clock.now()
        if self.is_on and now - self._taken_s <= PATIENCE_S:
            raise ConflictError("record", "<start>", "a recording is going on: end it first")
        self._end()
        self._name, self._secret = secrets.token_hex(8), secrets.token_bytes(32)
        self._start_s = self._taken_s = now
        self._scheduler.timeline.on_end = self._ended
        return {"recording": self._name, "block_size": self._cache.block_size}

    def take(self, recording: str) -> dict[str, Any]:
        """What was noted since the last call, or a part of it, then `has_more`.

        Raises:
            NotFoundError: this recording is over.
        """
        self._check(recording)
        self._taken_s = now = self._clock.now()
        taken: list[dict[str, Any]] = []
        room = MOST_TAKEN_BYTES
        while self._waiting and room > 0:
            record = self._waiting.popleft()
            taken.append(record)
            room -= _size(record)
            self._num_bytes -= _size(record)
        live = [r.arrival_s for r in self._scheduler.requests.values() if self._is_ours(r)]
        waiting = [record["arrival_s"] for record in self._waiting]
        return {
            "records": taken,
            "has_more": bool(self._waiting),
            "until_s": min([now - self._start_s, *waiting, *(s - self._start_s for s in live)]),
            "dropped": self._num_dropped,
            "running": len(live),
        }

    def stop(self, recording: str) -> None:
        """End it, and forget what was not taken.

        Raises:
            NotFoundError: it is over already.
        """
        self._check(recording)
        self._end()

    def _check(self, recording: str) -> None:
        if not self.is_on or recording != self._name:
            raise NotFoundError("recording", recording, "is over: start another")

    def _end(self) -> None:
        self._name, self._secret = "", b""
        self._waiting.clear()
        self._num_bytes = self._num_dropped = 0
        self._scheduler.timeline.on_end = None

    # ------------------------------------------------------------------ requests

    def _is_ours(self, request: Request) -> bool:
        return request.arrival_s >= self._start_s

    def _ended(self, request: Request) -> None:
        """A request ended: note it, if there is room."""
        if self._clock.now() - self._taken_s > PATIENCE_S:
            self._end()
        elif self._is_ours(request):
            record = self._record(request)
            if self._num_bytes + _size(record) > self._most_bytes:
                self._num_dropped += 1
                return
            self._waiting.append(record)
            self._num_bytes += _size(record)

    def _record(self, request: Request) -> dict[str, Any]:
        hints = request.hints
        session = hints.session_id if hints is not None else ""
        generated = max(seq.num_generated for seq in request.sequences)
        reasons = {seq.finish_reason for seq in request.sequences}
        return {
            "arrival_s": request.arrival_s - self._start_s,
            "input_tokens": len(request.prompt_token_ids),
            "output_tokens": max(1, generated),
            "blocks": self._ids(request),
            "session": self._hashed(repr((request.tenant, session))) if session else "",
            "turn": request.turn,
            "stop": hints.turn if hints is not None else "",
            "tenant": self._hashed(request.tenant) if request.tenant else "",
            "priority": request.priority,
            "aborted": FinishReason.ABORT in reasons,
        }

    def _ids(self, request: Request) -> bytes:
        """Of the full blocks of the prompt, `ID_BYTES` each."""
        size = self._cache.block_size
        keys = request.sequences[0].block_keys[: len(request.prompt_token_ids) // size]
        root = self._cache.tree.root_key(request.cache_salt)
        extend_keys(keys, root, request.prompt_token_ids, size)
        secret = self._secret
        return b"".join(blake2b(key, digest_size=ID_BYTES, key=secret).digest() for key in keys)

    def _hashed(self, name: str) -> str:
        data = name.encode("utf-8", "surrogatepass")
        return blake2b(data, digest_size=ID_BYTES, key=self._secret).hexdigest()


def _size(record: dict[str, Any]) -> int:
    return _RECORD_BYTES + len(record["blocks"])
