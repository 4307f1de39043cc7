"""What happened to each request, and when: recorded as it happens, in bounded memory.

An event is a tuple that begins with its time, the sequence's index and its kind:

    queued      the sequence exists
    loading     its blocks are on their way up
    running     it holds blocks and is part of steps
    chunk       a piece of its prompt was computed; until, first token, number of tokens
    preempted   it was stopped; what it computed may be dropped
    swapping    it was stopped; what no lower tier holds goes down first
    swapped     all of it has gone down
    finished    reason
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from tierkv.engine.request import Request, SeqState, Sequence
from tierkv.protocols import Clock

if TYPE_CHECKING:
    from tierkv.engine.plan import PlanRow

MOST_EVENTS = 256  # of a request; older ones are forgotten
MOST_ENDED = 64  # requests that are remembered after their end
MOST_SAMPLES = 8  # of a request, that are described one by one

Event = tuple[Any, ...]


class Timeline:
    """Events of all live requests, and of those that ended last.

    Args:
        clock: engine time.

    Attributes:
        on_end: is told of every request that ended.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.on_end: Callable[[Request], None] | None = None
        self._live: dict[str, deque[Event]] = {}
        self._ended: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def now(self) -> float:
        """The time that events are stamped with."""
        return self._clock.now()

    # ------------------------------------------------------------------ record

    def add(self, seq: Sequence) -> None:
        """A sequence exists; from now on it tells of its changes itself."""
        seq.on_move = self._moved
        self._live.setdefault(seq.request.request_id, deque(maxlen=MOST_EVENTS))
        self._note(seq, "queued")

    def _moved(self, seq: Sequence, before: SeqState) -> None:
        if seq.state is SeqState.FINISHED:
            self._note(seq, "finished", seq.finish_reason.value if seq.finish_reason else "")
        elif seq.state is SeqState.WAITING:
            self._note(seq, "preempted" if before is SeqState.RUNNING else "queued")
        else:
            self._note(seq, seq.state.value)

    def _note(self, seq: Sequence, kind: str, *rest: Any) -> None:
        self._append(seq, (self._clock.now(), seq.index, kind, *rest))

    def _append(self, seq: Sequence, event: Event) -> None:
        events = self._live.get(seq.request.request_id)
        if events is not None:
            events.append(event)

    def note_chunks(self, rows: Iterable[PlanRow], start_s: float, end_s: float) -> None:
        """A step computed these rows, each a piece of a prompt."""
        for row in rows:
            extent = (end_s, row.start, row.num_tokens)
            self._append(row.seq, (start_s, row.seq.index, "chunk", *extent))

    def end(self, request: Request) -> None:
        """All its sequences are finished: what is known of it stays for a while."""
        events = list(self._live.pop(request.request_id, ()))
        ending = {"events": events, "ended_s": self._clock.now()}
        self._ended[request.request_id] = facts(request) | ending
        self._ended.move_to_end(request.request_id)
        if len(self._ended) > MOST_ENDED:
            self._ended.popitem(last=False)
        if self.on_end is not None:
            self.on_end(request)

    # ------------------------------------------------------------------ look

    def last_ended(self, count: int) -> Iterator[dict[str, Any]]:
        """What is remembered of requests that ended, the last one first."""
        return islice(reversed(self._ended.values()), count)

    def describe(self, request: Request) -> dict[str, Any]:
        """All that is known of a live request."""
        events = list(self._live.get(request.request_id, ()))
        return facts(request) | {"events": events, "ended_s": None}

    def ended(self, request_id: str) -> dict[str, Any] | None:
        """All that is remembered of a request that ended, if it is one of the last."""
        return self._ended.get(request_id)


def facts(request: Request) -> dict[str, Any]:
    """A request in numbers; nothing of what it says."""
    samples = request.sequences[:MOST_SAMPLES]
    return {
        "request": request.request_id,
        "prompt_tokens": len(request.prompt_token_ids),
        "cached_tokens": request.num_cached_tokens or 0,
        "max_tokens": request.max_tokens,
        "generated_tokens": [seq.num_generated for seq in samples],
        "num_sequences": len(request.sequences),
        "preemptions": request.num_preemptions,
        "arrival_s": request.arrival_s,
        "first_token_s": request.first_token_s,
    }
