"""Running plans: each to its end, or one behind the other so that the device need not wait.

    host     plan 2 | launch 2 | read 1, commit 1 | draw 2 | plan 3 | launch 3 | read 2 ...
    device   forward 1, draw 1 | forward 2                 , draw 2 | forward 3 ...

Overlapped, a step is planned and launched before the host knows what the step before drew; the
device takes these tokens from where they are. It is drawn only after the step before was committed,
so grammars, penalties and limits see every token, and nobody has to be left out. What it costs: a
sequence that turns out to have ended is computed once more, for nothing, and news come a step
later. (SGLang's overlap scheduler delays sampling alike; vLLM: `--async-scheduling`.)
"""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.engine.cost import MeasuredCost
from tierkv.engine.outputs import SequenceOutput
from tierkv.engine.plan import Plan
from tierkv.engine.scheduler import Scheduler
from tierkv.protocols import Clock, Drawn, Executor, Sampler


@dataclass(slots=True)
class _Launched:
    """A step whose results were not read yet."""

    plan: Plan
    drawn: Drawn
    start_s: float


class Steps:
    """Runs the plans of one scheduler, in order, and commits them.

    Args:
        executor, sampler, scheduler, clock: of the engine.
        cost: learns what chunks take.
        is_overlapped: a step is launched before the one before it was read.

    Attributes:
        executor: may be wrapped between two steps.
        is_overlapped: may be changed between two steps.
    """

    def __init__(
        self,
        executor: Executor,
        sampler: Sampler,
        scheduler: Scheduler,
        clock: Clock,
        cost: MeasuredCost,
        *,
        is_overlapped: bool,
    ) -> None:
        self.executor, self.is_overlapped = executor, is_overlapped
        self._sampler, self._scheduler = sampler, scheduler
        self._clock, self._cost = clock, cost
        self._launched: _Launched | None = None
        self._read_s = clock.now()

    @property
    def is_busy(self) -> bool:
        """A step is under way."""
        return self._launched is not None

    def advance(self, plan: Plan) -> list[SequenceOutput]:
        """Run a plan, or if it is empty finish what is under way; news of what was committed."""
        if plan.is_empty:
            return self.settle()
        start_s = self._clock.now()
        if self._launched is not None:
            plan.unread = self._launched.drawn
        logits = self.executor.run(plan)
        self._scheduler.note_launched()
        outputs = self.settle()
        self._launched = _Launched(plan, self._sampler.draw(logits, plan), start_s)
        if not self.is_overlapped:
            outputs += self.settle()
        return outputs

    def settle(self) -> list[SequenceOutput]:
        """Read and commit the step under way, if there is one."""
        if self._launched is None:
            return []
        launched, self._launched = self._launched, None
        plan, results = launched.plan, launched.drawn.results()
        plan.unread = None
        chunks = [row for row in plan.rows if row.num_tokens > 1]
        start_s, self._read_s = max(launched.start_s, self._read_s), self._clock.now()
        if chunks:
            shapes = [(row.start, row.num_tokens) for row in chunks]
            self._cost.note_step(shapes, self._read_s - start_s)
            self._scheduler.timeline.note_chunks(chunks, start_s, self._read_s)
        return self._scheduler.commit(plan, results)

    def forget(self, seq_id: int) -> None:
        """The sequence is finished."""
        self.executor.forget(seq_id)
        self._sampler.forget(seq_id)
