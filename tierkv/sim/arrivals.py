"""From a trace's request to one that the engine can run: tokens and keys that are equal where the
trace says so.

The first two tokens of a block spell its id, the others are 0; a block's key is its id. What a
request generates has an id too: that of its session's next prompt at the same place, when that
prompt goes on where this request ends (the answer came back as a part of it), and one of its own
otherwise.
"""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tierkv.sim.trace import Run, TraceRequest
from tierkv.types import BlockKey

LOOK_AHEAD = 4096
"""Requests among which a session's next one is looked for."""

_OWN = (1 << 63) + (1 << 31)  # ids of blocks that nobody else has begin here
_LOW = (1 << 32) - 1
_KEY_BYTES = 16


@dataclass(slots=True, eq=False)
class Arrival:
    """A request with what the trace knows of its future.

    Attributes:
        number: in the trace, from 0.
        request: as the trace has it.
        following: the session's next request, if it comes soon enough to be known.
    """

    number: int
    request: TraceRequest
    following: TraceRequest | None = None


def with_following(requests: Iterable[TraceRequest]) -> Iterator[Arrival]:
    """Each request with its session's next one among the `LOOK_AHEAD` that come after it."""
    window: deque[Arrival] = deque()
    last: dict[str, Arrival] = {}
    for number, request in enumerate(requests):
        arrival = Arrival(number, request)
        window.append(arrival)
        if request.session:
            before = last.get(request.session)
            if before is not None:
                before.following = request
            last[request.session] = arrival
        if len(window) > LOOK_AHEAD:
            yield _oldest(window, last)
    while window:
        yield _oldest(window, last)


def _oldest(window: deque[Arrival], last: dict[str, Arrival]) -> Arrival:
    arrival = window.popleft()
    if last.get(arrival.request.session) is arrival:
        del last[arrival.request.session]
    return arrival


def id_at(runs: Iterable[Run], index: int) -> int | None:
    """The id of one block; None beyond the last."""
    for first, count in runs:
        if index < count:
            return first + index
        index -= count
    return None


class BlockNames:
    """Ids of all blocks of requests, of those they generate too.

    Args:
        block_size: tokens per block.
        reuses_outputs: whether what is generated may come back in the session's next prompt.
    """

    def __init__(self, block_size: int, *, reuses_outputs: bool = True) -> None:
        self.block_size = block_size
        self._reuses_outputs = reuses_outputs
        self._own = itertools.count(_OWN)

    def ids_of(self, arrival: Arrival) -> list[int]:
        """An id for each block of the prompt and the output, the last partial one included."""
        request = arrival.request
        ids = request.block_ids()[: request.input_tokens // self.block_size]
        total = -(-(request.input_tokens + request.output_tokens) // self.block_size)
        if self._reuses_outputs and arrival.following is not None:
            ids += self._continued(ids, request, arrival.following)
        ids += [next(self._own) for _ in range(total - len(ids))]
        return ids

    def _continued(
        self, ids: list[int], request: TraceRequest, following: TraceRequest
    ) -> list[int]:
        """Ids that the next prompt gives to what this one generates: full blocks only."""
        known = len(ids)
        if known and id_at(following.runs, known - 1) != ids[-1]:
            return []
        last = (request.input_tokens + request.output_tokens) // self.block_size
        found = (id_at(following.runs, index) for index in range(known, last))
        return [block for block in found if block is not None]

    def prompt_of(self, ids: list[int], num_tokens: int) -> array[int]:
        """Token ids of a prompt, 4 bytes each."""
        size, count = self.block_size, -(-num_tokens // self.block_size)
        tokens = array("I", bytes(4 * count * size))
        tokens[::size] = array("I", [block & _LOW for block in ids[:count]])
        if size > 1:
            tokens[1::size] = array("I", [block >> 32 for block in ids[:count]])
        del tokens[num_tokens:]
        return tokens

    def token_at(self, ids: list[int], position: int) -> int:
        """The token that is generated at a position."""
        index, offset = divmod(position, self.block_size)
        if offset > 1 or index >= len(ids):
            return 0
        return ids[index] >> 32 if offset else ids[index] & _LOW


def key_of(block: int) -> BlockKey:
    """The key of a block."""
    return block.to_bytes(_KEY_BYTES, "big")
