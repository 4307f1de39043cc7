"""The seams of the engine: what it asks of a clock, an executor and a sampler.

Each has a real and a simulated implementation; the engine never knows which it got. The mover and
the cost model join them when there is a second tier to move blocks to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tierkv.types import RowResult

if TYPE_CHECKING:
    from tierkv.engine.plan import Plan


class Clock(Protocol):
    """Time in seconds; only differences mean anything."""

    def now(self) -> float: ...


class Executor(Protocol):
    """Runs a plan's copies and its forward pass. Owns the GPU pool's bytes and nothing else.

    `run` is called from one thread, one plan at a time, in the order the plans were made.
    """

    def run(self, plan: Plan) -> Any:
        """Copy-on-write first, then the forward.

        Returns the logits `[sum(row.num_logit_rows), vocab_size]`, rows in plan order.
        """
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence is finished; unknown ids are ignored."""
        ...


class Sampler(Protocol):
    """Turns logits into tokens; keeps per-sequence state (seeds, penalty counts) by `seq_id`."""

    def sample(self, logits: Any, plan: Plan) -> list[RowResult]:
        """One result per row of `plan.rows`, in order."""
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence is finished; unknown ids are ignored."""
        ...
