"""What a trace is: requests as they arrived, their prompts as ids of blocks, no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Run = tuple[int, int]
"""`(first id, count)`: the ids `first, first + 1, ...` of consecutive blocks."""


@dataclass(slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival_s: seconds from the start of the trace; does not fall from one to the next.
        input_tokens, output_tokens: lengths, at least 1.
        runs: ids of the full blocks of the prompt, from the root on. An id stands for the whole
            prefix that ends with its block: where two requests have an id in common, they have
            all before it in common.
        session: name of the conversation, empty when the trace does not say.
        turn: its number within the session, from 1; 0 when unknown.
        stop_reason: what the client did with the answer: "tool_call" (the next turn comes at
            once), "end" (a person's turn), "" when unknown.
        tenant: whose it is, empty when nobody says.
        priority: lower is more urgent.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    runs: tuple[Run, ...] = ()
    session: str = ""
    turn: int = 0
    stop_reason: str = ""
    tenant: str = ""
    priority: int = 0

    @property
    def num_blocks(self) -> int:
        return sum(count for _, count in self.runs)

    def block_ids(self) -> list[int]:
        """All ids, root first."""
        return [first + i for first, count in self.runs for i in range(count)]


@dataclass(slots=True)
class Trace:
    """A trace that can be read again and again, a request at a time.

    Attributes:
        name: of its file or generator.
        block_size: tokens per block.
        open: begins to read it.
    """

    name: str
    block_size: int
    open: Callable[[], Iterator[TraceRequest]]

    def __iter__(self) -> Iterator[TraceRequest]:
        return self.open()
