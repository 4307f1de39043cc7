"""What a trace is like, in numbers: how long, how much of it comes back, how much is in use.

    hit rate        tokens in blocks that an earlier prompt had, of all prompt tokens: what a cache
                    that never evicts would find. (Answers that come back in a prompt count as new
                    there, though an engine that keeps them finds them too.)
    reused blocks   distinct blocks that more than one prompt has, of all distinct blocks
    working set     distinct blocks that prompts have within `WINDOW_S` seconds, at most: windows
                    follow one another

All ids are kept while it is counted: about 100 bytes for each distinct block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tierkv.sim.trace import Trace, TraceRequest

WINDOW_S = 600.0


@dataclass(slots=True)
class Spread:
    """How a number is spread over requests."""

    total: int
    mean: float
    p50: int
    p90: int
    p99: int
    most: int

    @classmethod
    def of(cls, values: list[int]) -> Spread:
        """Of these; there is at least one."""
        ordered = sorted(values)
        p50, p90, p99 = (ordered[len(ordered) * percent // 100] for percent in (50, 90, 99))
        total = sum(ordered)
        return cls(total, total / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(slots=True)
class TraceStats:
    """The numbers; sizes in tokens or blocks, times in seconds."""

    name: str
    block_size: int
    requests: int
    sessions: int
    tenants: int
    span_s: float
    input_tokens: Spread
    output_tokens: Spread
    blocks: int
    unique_blocks: int
    reused_blocks: int
    hit_rate: float
    working_set_blocks: int
    tool_calls: int
    ends: int


@dataclass(slots=True)
class _Counts:
    """What is counted on the way."""

    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)
    tenants: set[str] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    again: set[int] = field(default_factory=set)
    window: set[int] = field(default_factory=set)
    window_number: int = 0
    working_set: int = 0
    num_blocks: int = 0
    num_hits: int = 0
    num_tool_calls: int = 0
    num_ends: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    def add(self, request: TraceRequest) -> None:
        self.inputs.append(request.input_tokens)
        self.outputs.append(request.output_tokens)
        self.sessions.update([request.session] if request.session else ())
        self.tenants.update([request.tenant] if request.tenant else ())
        self.num_tool_calls += request.stop_reason == "tool_call"
        self.num_ends += request.stop_reason == "end"
        if len(self.inputs) == 1:
            self.first_s = request.arrival_s
        self.last_s = request.arrival_s
        self._begin_window(int(request.arrival_s // WINDOW_S))
        for first, count in request.runs:
            self._add_run(range(first, first + count))

    def _add_run(self, run: range) -> None:
        before = len(self.seen)
        self.seen.update(run)
        num_new = len(self.seen) - before
        self.again.update(run[: len(run) - num_new])  # ids name prefixes: known ones come first
        self.window.update(run)
        self.num_blocks += len(run)
        self.num_hits += len(run) - num_new

    def _begin_window(self, number: int) -> None:
        if number != self.window_number:
            self.end_window()
            self.window_number = number

    def end_window(self) -> None:
        self.working_set = max(self.working_set, len(self.window))
        self.window.clear()


def trace_stats(trace: Trace) -> TraceStats:
    """The numbers of a trace, which is read once."""
    counts = _counted(trace)
    inputs = Spread.of(counts.inputs)
    return TraceStats(
        name=trace.name,
        block_size=trace.block_size,
        requests=len(counts.inputs),
        sessions=len(counts.sessions),
        tenants=len(counts.tenants),
        span_s=counts.last_s - counts.first_s,
        input_tokens=inputs,
        output_tokens=Spread.of(counts.outputs),
        blocks=counts.num_blocks,
        unique_blocks=len(counts.seen),
        reused_blocks=len(counts.again),
        hit_rate=counts.num_hits * trace.block_size / inputs.total,
        working_set_blocks=counts.working_set,
        tool_calls=counts.num_tool_calls,
        ends=counts.num_ends,
    )


def _counted(requests: Iterable[TraceRequest]) -> _Counts:
    counts = _Counts()
    for request in requests:
        counts.add(request)
    counts.end_window()
    return counts
