"""Generated traces: sessions that begin at random, each going on turn by turn.

    session   begins after Exp(1 / session_rate) seconds; draws a system prompt and documents by
              popularity, then a first prompt
    turn      prompt = all that came before + new tokens; after a gap comes the next one, with
              probability 1 - 1 / turns. A branch changes something at the end of an earlier
              prompt (or at the first one's start): what follows there is as long as before, and
              has new ids.
    context   where prompt and answer would exceed `max_context`, the session keeps what it shares
              and goes on with the new tokens alone, under new ids

What is drawn depends on the seed only. Memory is that of the sessions which are live.

Ids: those of shared blocks are hashes of what is before and in them (the system prompt, then each
document), so that they need not be remembered; a session's own are numbered from its own start.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

from tierkv.errors import ConfigError
from tierkv.sim.trace import Run, Trace, TraceRequest
from tierkv.sim.trace_fields import hash63
from tierkv.sim.workloads import Workload, workload_of

_RUN_BITS = 20  # blocks of a shared text, at most
_SESSION_BITS = 26  # blocks of one session, its branches included, at most
_OWN = 1 << 62  # sessions' own ids begin here, shared ones are below


def generate_trace(
    workload: str | Workload, *, num_requests: int, seed: int = 0, **knobs: Any
) -> Trace:
    """A trace of so many requests.

    Args:
        workload: a name (`chat`, `agents`, `rag`, `coding`) or all knobs.
        num_requests: how many.
        seed: of everything random.
        knobs: fields of `Workload` that differ from the named workload's.

    Raises:
        ConfigError: a name is unknown, or a value out of range.
    """
    if num_requests < 1:
        raise ConfigError("num_requests", num_requests, "must be at least 1")
    if isinstance(workload, Workload):
        name, chosen = "workload", workload
    else:
        name, chosen = workload, workload_of(workload, knobs)

    def begin() -> Iterator[TraceRequest]:
        return itertools.islice(_Generator(chosen, seed).requests(), num_requests)

    return Trace(f"{name}-{num_requests}-seed{seed}", chosen.block_size, begin)


class _Generator:
    """Draws sessions and interleaves their turns."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload = workload
        self._random = random.Random(seed)
        self._systems = _cumulative(workload.num_systems, workload.popularity)
        self._documents = _cumulative(workload.num_documents, workload.popularity)

    def requests(self) -> Iterator[TraceRequest]:
        """Without end, in order of time."""
        due: list[tuple[float, int, _Session]] = []
        numbers = itertools.count()
        next_start_s = 0.0
        while True:
            if not due or next_start_s <= due[0][0]:
                number = next(numbers)
                heapq.heappush(due, (next_start_s, number, self._session(number)))
                next_start_s += self._random.expovariate(self._workload.session_rate)
                continue
            now, number, session = heapq.heappop(due)
            yield session.request(now)
            gap_s = self._go_on(session)
            if gap_s is not None:
                heapq.heappush(due, (now + gap_s, number, session))

    def _session(self, number: int) -> _Session:
        """A session that is about to send its first request."""
        w, rng = self._workload, self._random
        session = _Session(number, w)
        chain: list[int] = [_drawn(rng, self._systems)]
        session.share(chain, w.system_tokens)
        for _ in range(min(w.session_documents, w.num_documents)):
            chain.append(_drawn(rng, self._documents))
            tokens = _document_tokens(w, chain[-1])
            if session.num_tokens + tokens < w.max_context - 2 * w.block_size:
                session.share(chain, tokens)
        if w.num_tenants:
            session.tenant = f"tenant-{rng.randrange(w.num_tenants)}"
        session.end_shared()
        self._add(session, _size(rng, w.first_tokens, w.first_spread))
        return session

    def _add(self, session: _Session, num_new: int) -> None:
        """New tokens, the answer to come, and what the client does with it."""
        w, rng = self._workload, self._random
        num_output = _size(rng, w.output_tokens, w.output_spread)
        is_last = session.turn + 1 >= w.max_turns or rng.random() < 1 / w.turns
        is_tool = not is_last and rng.random() < w.tool_share
        session.add(num_new, num_output, is_last=is_last, is_tool=is_tool)

    def _go_on(self, session: _Session) -> float | None:
        """Prepare the next turn; seconds until it comes, None after the last."""
        w, rng = self._workload, self._random
        if session.is_last:
            return None
        if session.is_tool:
            gap_s = rng.lognormvariate(math.log(w.tool_gap_s), w.tool_spread)
            num_new = _size(rng, w.result_tokens, w.result_spread)
        else:
            gap_s = rng.lognormvariate(math.log(w.think_gap_s), w.think_spread)
            num_new = _size(rng, w.user_tokens, w.user_spread)
        if rng.random() < w.branch_share:
            session.branch(rng.randrange(session.num_marks))
        self._add(session, num_new)
        return gap_s


class _Session:
    """A conversation: how long it is, and which ids its blocks have.

    Attributes:
        num_tokens: all tokens so far: the next prompt, before `request`; with the answer, after.
        turn: of the last request.
        is_last, is_tool: what comes after the pending request.
        tenant: whose it is.
    """

    def __init__(self, number: int, workload: Workload) -> None:
        self.num_tokens = self.turn = 0
        self.is_last = self.is_tool = False
        self.tenant = ""
        self._name = str(number)
        self._size, self._most = workload.block_size, workload.max_context
        self._parts: list[Run] = []  # (first block, its id), up to the next part
        self._fresh = _OWN + (number << _SESSION_BITS)
        self._marks: list[int] = []
        self._num_shared = self._num_output = 0

    @property
    def num_marks(self) -> int:
        return len(self._marks)

    def share(self, chain: list[int], num_tokens: int) -> None:
        """Text that others have, too, after the same text before it."""
        if num_tokens:
            first_id = hash63(repr(chain).encode()) % _OWN >> _RUN_BITS << _RUN_BITS
            self._parts.append((self.num_tokens // self._size, first_id))
            self.num_tokens += num_tokens

    def end_shared(self) -> None:
        """What follows nobody else has."""
        self._num_shared = self.num_tokens
        self.begin_own()

    def begin_own(self) -> None:
        """Keep what is shared, and begin anew."""
        self._change(self._num_shared)
        self.num_tokens = self._num_shared
        self._marks = [self._num_shared]

    def add(self, num_new: int, num_output: int, *, is_last: bool, is_tool: bool) -> None:
        """What the next request adds, and what comes after it."""
        self.is_last, self.is_tool = is_last, is_tool
        self._num_output = min(num_output, self._most - self._num_shared - self._size)
        room = self._most - self._num_output
        if self.num_tokens + num_new > room:
            self.begin_own()
        self.num_tokens = min(self.num_tokens + num_new, room)

    def request(self, now: float) -> TraceRequest:
        """The request, and then its answer is part of the conversation."""
        self.turn += 1
        request = TraceRequest(
            round(now, 6),
            self.num_tokens,
            self._num_output,
            self._runs(),
            session=self._name,
            turn=self.turn,
            stop_reason="tool_call" if self.is_tool else "end",
            tenant=self.tenant,
        )
        self._marks.append(self.num_tokens)
        self.num_tokens += self._num_output
        return request

    def branch(self, mark: int) -> None:
        """From an earlier place on the text is another, as long as before."""
        self._change(self._marks[mark])

    def _change(self, num_tokens: int) -> None:
        """Whatever follows so many tokens has new ids."""
        block = num_tokens // self._size
        if self._parts and self._parts[-1][1] >= _OWN:
            start, first_id = self._parts[-1]
            self._fresh = first_id + self.num_tokens // self._size + 1 - start
        while self._parts and self._parts[-1][0] >= block:
            self._parts.pop()
        self._parts.append((block, self._fresh))

    def _runs(self) -> tuple[Run, ...]:
        """Ids of the full blocks of the prompt."""
        full = self.num_tokens // self._size
        ends = [start for start, _ in self._parts[1:]] + [full]
        return tuple(
            (first_id, min(end, full) - start)
            for (start, first_id), end in zip(self._parts, ends, strict=True)
            if start < min(end, full)
        )


def _cumulative(count: int, exponent: float) -> list[float]:
    """Cumulative weights of Zipf's law."""
    return list(itertools.accumulate(rank**-exponent for rank in range(1, count + 1)))


def _drawn(rng: random.Random, cumulative: list[float]) -> int:
    (which,) = rng.choices(range(len(cumulative)), cum_weights=cumulative)
    return which


def _size(rng: random.Random, median: float, spread: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(median), spread)))


def _document_tokens(workload: Workload, document: int) -> int:
    """The length of a document, which is the same each time it is used."""
    rng = random.Random(document)
    return _size(rng, workload.document_tokens, workload.document_spread)
