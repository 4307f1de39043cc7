"""The engine's executor and sampler in virtual time: a step takes what the cost says, and its
tokens are those that the trace has."""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.engine.plan import Plan, PlanRow
from tierkv.sim.arrivals import Arrival, BlockNames, key_of
from tierkv.sim.clock import VirtualClock
from tierkv.sim.quantiles import Quantiles
from tierkv.sim.steps import StepCost
from tierkv.types import GivenResults, RowResult, SampledToken

_NOTHING = RowResult()
_ZERO = RowResult([SampledToken(0)])  # most tokens: nobody changes a result


@dataclass(slots=True, eq=False)
class Stream:
    """A live request of the trace.

    Attributes:
        arrival: what it is.
        ids: of all its blocks, generated ones included.
        last_token_s: when its last token came.
    """

    arrival: Arrival
    ids: list[int]
    last_token_s: float = 0.0


class SimExecutor:
    """An `Executor` that takes time and does nothing else.

    Args:
        clock: advanced by each step.
        cost: of a step.
    """

    def __init__(self, clock: VirtualClock, cost: StepCost) -> None:
        self._clock = clock
        self._cost = cost
        self.busy_s = 0.0

    def run(self, plan: Plan) -> None:
        seconds = self._cost.step_s([(row.start, row.num_tokens) for row in plan.rows])
        self.busy_s += seconds
        self._clock.advance(seconds)

    def forget(self, seq_id: int) -> None:
        """Nothing is kept."""


class SimSampler:
    """A `Sampler` that continues each request as its trace does.

    Args:
        clock: tells when a token comes.
        names: of blocks.
        gaps: takes the seconds between two tokens of a sequence.

    Attributes:
        streams: live requests, by their id in the engine.
    """

    def __init__(self, clock: VirtualClock, names: BlockNames, gaps: Quantiles) -> None:
        self.streams: dict[str, Stream] = {}
        self._clock = clock
        self._names = names
        self._gaps = gaps

    def draw(self, logits: object, plan: Plan) -> GivenResults:
        now = self._clock.now()
        rows = plan.rows
        return GivenResults([self._sample(r, now) if r.num_samples else _NOTHING for r in rows])

    def _sample(self, row: PlanRow, now: float) -> RowResult:
        seq = row.seq
        stream = self.streams[seq.request.request_id]
        if stream.last_token_s:
            self._gaps.add(now - stream.last_token_s)
        stream.last_token_s = now
        position, size = len(seq.token_ids), self._names.block_size
        offset = (position + 1) % size
        if offset == 0:  # the token completes a block: its key is what the trace says
            keys = seq.block_keys
            keys += [key_of(block) for block in stream.ids[len(keys) : (position + 1) // size]]
        if position % size > 1:
            return _ZERO
        return RowResult([SampledToken(self._names.token_at(stream.ids, position))])

    def forget(self, seq_id: int) -> None:
        """Streams end with their requests."""
