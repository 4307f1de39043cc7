"""Replay: a trace through one engine in virtual time.

Requests come when the trace says, scaled by a rate; a session's next one not before the answer to
the one before it. Requests that could not run alone in the pool are left out and counted.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from tierkv.engine.kv_hints import KvHints
from tierkv.engine.outputs import SequenceOutput
from tierkv.engine.request import Request
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import InvariantError
from tierkv.sim.arrivals import Arrival, BlockNames, key_of, with_following
from tierkv.sim.executor import Stream
from tierkv.sim.machine import Machine, World, build_world
from tierkv.sim.measures import DEFAULT_SLO, Measures, Slo, Tally
from tierkv.sim.trace import Trace, TraceRequest

MOST_QUEUED = 1024
"""Requests that the engine knows of at once; more wait outside, in the order they came."""

Progress = Callable[[int], None]


@dataclass(slots=True, frozen=True)
class Load:
    """How a trace is played.

    Attributes:
        rate: times the trace's own speed.
        max_tokens: requests with more, prompt and output, are left out; None: what the pool holds.
        reuses_outputs: what is generated may come back in the session's next prompt.
        has_hints: requests tell their session and what their answer is for.
    """

    rate: float = 1.0
    max_tokens: int | None = None
    reuses_outputs: bool = True
    has_hints: bool = True


AS_RECORDED = Load()


def replay(
    trace: Trace,
    machine: Machine,
    load: Load = AS_RECORDED,
    slo: Slo = DEFAULT_SLO,
    progress: Progress | None = None,
) -> Measures:
    """Play the whole trace and measure.

    Args:
        trace: what comes.
        machine: what serves it.
        load: how fast, and what of it.
        slo: what counts as good.
        progress: told of each request that was read, with its number.

    Raises:
        ConfigError: an option of the machine is wrong.
    """
    names = BlockNames(trace.block_size, reuses_outputs=load.reuses_outputs)
    world = build_world(machine, names)
    with _few_collections():
        return _Replay(world, machine, names, load, slo, progress).run(trace)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Look for cyclic garbage less often: there is little, and millions of blocks to look at."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Replay:
    """The state of one replay."""

    def __init__(
        self,
        world: World,
        machine: Machine,
        names: BlockNames,
        load: Load,
        slo: Slo,
        progress: Progress | None,
    ) -> None:
        self._world = world
        self._names = names
        self._load = load
        self._limit = min(machine.max_tokens, load.max_tokens or machine.max_tokens)
        self._progress = progress
        self._tally = Tally(slo)
        self._source: Iterator[Arrival] = iter(())
        self._next: Arrival | None = None
        self._due: deque[tuple[float, Arrival]] = deque()
        self._sessions: dict[str, deque[tuple[float, Arrival]]] = {}
        self._params = SamplingParams(temperature=0.0, ignore_eos=True)

    def run(self, trace: Trace) -> Measures:
        self._source = with_following(trace)
        self._advance_source()
        core, clock = self._world.core, self._world.clock
        while True:
            self._take_arrivals()
            self._submit()
            before = clock.now()
            if core.has_work:
                outputs = core.step()
                for output in outputs:
                    if output.finish_reason is not None:
                        self._ended(output)
                if outputs or clock.now() > before:
                    continue
            else:
                core.work_in_background()
            if not self._jump():
                break
        return self._tally.measures(self._world)

    # ------------------------------------------------------------------ time

    def _jump(self) -> bool:
        """Go to whatever comes next; False when nothing does."""
        world = self._world
        times = [] if self._next is None else [self._arrival_s(self._next)]
        event = world.mover.next_event_s() if world.mover is not None else None
        if event is not None and (times or world.core.has_work):
            times.append(event)
        if times:
            world.clock.advance_to(min(times))
            return True
        if world.core.has_work or self._due:
            raise InvariantError("requests wait, and nothing will happen any more")
        return False

    def _arrival_s(self, arrival: Arrival) -> float:
        return arrival.request.arrival_s / self._load.rate

    # ------------------------------------------------------------------ requests

    def _advance_source(self) -> None:
        self._next = next(self._source, None)
        if self._progress is not None and self._next is not None:
            self._progress(self._next.number + 1)

    def _take_arrivals(self) -> None:
        now = self._world.clock.now()
        while self._next is not None and self._arrival_s(self._next) <= now:
            arrival = self._next
            self._advance_source()
            self._arrived(arrival)

    def _arrived(self, arrival: Arrival) -> None:
        request = arrival.request
        if request.input_tokens + request.output_tokens > self._limit:
            self._tally.num_excluded += 1
            return
        entry = self._arrival_s(arrival), arrival
        if not request.session:
            self._due.append(entry)
        elif request.session in self._sessions:
            self._sessions[request.session].append(entry)
        else:
            self._sessions[request.session] = deque()
            self._due.append(entry)

    def _submit(self) -> None:
        room = MOST_QUEUED - len(self._world.sampler.streams)
        while self._due and room > 0:
            self._begin(*self._due.popleft())
            room -= 1

    def _begin(self, arrival_s: float, arrival: Arrival) -> None:
        core, item, size = self._world.core, arrival.request, self._names.block_size
        ids, count = self._names.ids_of(arrival), item.input_tokens
        request = Request(
            str(arrival.number),
            [0] * count,
            self._params,
            max_tokens=item.output_tokens,
            arrival_s=arrival_s,
            priority=item.priority,
            tenant=item.tenant,
            hints=self._hints(item),
        )
        self._world.sampler.streams[request.request_id] = Stream(arrival, ids)
        core.scheduler.add(request)
        core.control.admit(request)
        (seq,) = request.sequences
        # A live request costs 4 bytes a token; what a list of its prompt says is not asked again.
        seq.token_ids = cast("list[int]", self._names.prompt_of(ids, count))
        request.prompt_token_ids = cast("list[int]", range(count))
        seq.block_keys = [key_of(block) for block in ids[: count // size]]

    def _hints(self, item: TraceRequest) -> KvHints | None:
        if not self._load.has_hints or not (item.session or item.stop_reason):
            return None
        return KvHints(session_id=item.session, turn=item.stop_reason)

    def _ended(self, output: SequenceOutput) -> None:
        item = self._world.sampler.streams.pop(output.request_id).arrival.request
        self._tally.ended(item, output)
        if not item.session:
            return
        waiting = self._sessions[item.session]
        if waiting:
            arrival_s, arrival = waiting.popleft()
            self._due.append((max(arrival_s, self._world.clock.now()), arrival))
        else:
            del self._sessions[item.session]
