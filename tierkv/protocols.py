"""The seams of the engine: what it asks of a clock, an executor, a sampler and a mover.

Each has a real and a simulated implementation; the engine never knows which it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from tierkv.types import BlockKey, Erasure, Move, MoveResult, RowResult, TierName

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
        """Copy-on-write first, then the forward; need not wait for the device.

        Returns the logits `[sum(row.num_logit_rows), vocab_size]`, rows in plan order.
        """
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence is finished; unknown ids are ignored."""
        ...


class Workers(Protocol):
    """Processes that the executor needs."""

    @property
    def is_alive(self) -> bool:
        """All of them are."""
        ...

    def check(self) -> None:
        """Raise EngineDeadError if one has ended."""
        ...

    def close(self) -> None:
        """End them. Idempotent."""
        ...


class Drawn(Protocol):
    """What was drawn for a step; its values may still be on their way from the device."""

    def results(self) -> list[RowResult]:
        """One per row of the plan, in order; waits for the device. Called once."""
        ...


class Sampler(Protocol):
    """Turns logits into tokens; keeps per-sequence state (seeds, penalty counts) by `seq_id`."""

    def draw(self, logits: Any, plan: Plan) -> Drawn:
        """Draw for every row of `plan.rows` whose sequence is live.

        The steps before were committed: every token of a sequence is known, but those drawn here.
        Executor and sampler agree on what an unread `Drawn` holds; see `Plan.unread`.
        """
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence is finished; unknown ids are ignored."""
        ...


class Mover(Protocol):
    """Copies blocks between tiers while the engine computes.

    Called from the engine's thread. Of moves that wait for the same link the more urgent one goes
    first, equals in the order in which they began. The caller keeps every destination slot
    reserved and every source unchanged until the move's result was polled, or until the move was
    polled as released: then its slot in the pool, whichever end that is, may be used again.
    """

    def begin(self, moves: Sequence[Move]) -> None:
        """Queue moves; never waits for one."""
        ...

    def poll(self) -> list[MoveResult]:
        """Those that ended since the last call, each reported once."""
        ...

    def poll_released(self) -> list[int]:
        """Tickets of moves that go on but have no more to do with the pool, since the last call;
        each at most once, and none whose result was polled."""
        ...

    def abandon(self, tickets: Sequence[int]) -> None:
        """Nobody wants what these moves bring into the pool: they are released as soon as can be,
        and end like any other."""
        ...

    def poll_erased(self) -> list[Erasure]:
        """How erasures ended since the last call. An erasure that ended before a write into its
        slot can be polled before the write's result can."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when something can be polled, or after `timeout_s` seconds."""
        ...

    def erase(self, slots: Sequence[int]) -> None:
        """Make slots of the persistent tier empty for good, in the background and before the
        writes that begin after this."""
        ...

    def touch(self, slots: Sequence[int]) -> None:
        """Blocks in these slots of the persistent tier were used; costs no I/O."""
        ...

    def is_quarantined(self, *, is_read: bool) -> bool:
        """Whether reads from (or writes to) the persistent tier are refused for now, because too
        many have failed."""
        ...

    def close(self) -> None:
        """End after the moves that have begun; more are not accepted. Idempotent."""
        ...


class BlockPort(Protocol):
    """The bytes of blocks, for whoever stands outside the tiers. The engine's thread calls."""

    def read(self, tier: TierName, slot: int, key: BlockKey) -> Future[bytes | None]:
        """A block's bytes once they are there; None when the tier does not hold it (any more).
        Memory answers at once."""
        ...

    def write(self, slot: int, payload: bytes) -> None:
        """Let a block of the pool, which nobody reads, be these bytes."""
        ...

    def give_back(self) -> int:
        """Let the system have the pool's memory, no block of which is wanted; returns bytes."""
        ...


class CostModel(Protocol):
    """What computing and moving are expected to take, in seconds."""

    def compute_s(self, start: int, num_tokens: int) -> float:
        """To compute the KV of `num_tokens` tokens after `start` others."""
        ...

    def up_s(self, tier: TierName, num_blocks: int) -> float:
        """To bring blocks from `tier` into the pool, once their turn has come; the fixed part of
        it for 0 blocks."""
        ...

    def down_s(self, tier: TierName, num_blocks: int) -> float:
        """To bring blocks from the pool into `tier`."""
        ...
