"""A cache over tiers whose moves end when the test says so, and sequences without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ledger import ManualClock

from tierkv.cache.holder import Wishes
from tierkv.cache.lower_tiers import MoveLimits, TierSpec
from tierkv.cache.prefix_tree import Block
from tierkv.cache.shares import Share
from tierkv.cache.tiered_cache import Match, TieredCache
from tierkv.policies import registry
from tierkv.protocols import CostModel
from tierkv.types import (
    BlockKey,
    Erasure,
    Move,
    MoveFailure,
    MoveResult,
    TierName,
)

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
BLOCK = 4
"""Tokens of a block."""


class HandMover:
    """Remembers what it was asked; the test ends it.

    Attributes:
        moves: begun and not ended, in order.
        erasing: slots to be erased, likewise.
        touched: slots in the calls of `touch`.
        abandoned: tickets.
    """

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.erasing: list[int] = []
        self.touched: list[list[int]] = []
        self.quarantined: set[bool] = set()
        self.abandoned: list[int] = []
        self._results: list[MoveResult] = []
        self._released: list[int] = []
        self._erasures: list[Erasure] = []

    def end(self, move: Move, failure: MoveFailure | None = None, seconds: float = 0.5) -> None:
        self.moves.remove(move)
        self._results.append(MoveResult(move.ticket, failure, seconds))

    def end_all(self) -> None:
        for move in list(self.moves):
            self.end(move)

    def release(self, move: Move) -> None:
        self._released.append(move.ticket)

    def end_erasing(self, failure: MoveFailure | None = None) -> None:
        self._erasures += [Erasure(slot, failure) for slot in self.erasing]
        self.erasing = []

    # ------------------------------------------------------------------ the protocol

    def begin(self, moves: Sequence[Move]) -> None:
        self.moves += moves

    def poll(self) -> list[MoveResult]:
        results, self._results = self._results, []
        return results

    def poll_released(self) -> list[int]:
        released, self._released = self._released, []
        return released

    def poll_erased(self) -> list[Erasure]:
        erasures, self._erasures = self._erasures, []
        return erasures

    def abandon(self, tickets: Sequence[int]) -> None:
        self.abandoned += tickets

    def wait(self, timeout_s: float) -> None:
        pass

    def erase(self, slots: Sequence[int]) -> None:
        self.erasing += slots

    def touch(self, slots: Sequence[int]) -> None:
        self.touched.append(list(slots))

    def is_quarantined(self, *, is_read: bool) -> bool:
        return is_read in self.quarantined

    def close(self) -> None:
        pass


@dataclass(eq=False)
class Holder:
    """A `BlockHolder`."""

    seq_id: int
    token_ids: list[int]
    num_computed: int = 0
    num_sealed: int = 0
    num_released: int = 0
    num_prompt_tokens: int = 0
    blocks: list[Block | None] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_keys: list[BlockKey] = field(default_factory=list)
    table_version: int = 0
    num_loading: int = 0
    load_from: int = 0
    load_tokens: int = 0
    tail: Block | None = None
    tail_tokens: int = 0
    cache_salt: str = ""
    priority: int = 0
    hints: Wishes | None = None
    tenant: str = ""
    turn: int = 0
    owner: Share | None = None


class Bench:
    """A cache, and what one does with it.

    Args:
        pool, cpu, nvme: blocks of each tier; 0 for none.
        eviction: policy of every tier.
        cost: of the cache.
    """

    def __init__(
        self,
        pool: int = 32,
        cpu: int = 0,
        nvme: int = 0,
        eviction: str = "lru",
        admission: str = "write-through",
        limits: MoveLimits | None = None,
        cost: CostModel | None = None,
    ) -> None:
        self.clock, self.mover = ManualClock(), HandMover()
        specs = [
            TierSpec(name, size, registry.create("eviction", eviction), self._admission(admission))
            for name, size in ((CPU, cpu), (NVME, nvme))
            if size
        ]
        more = {} if cost is None else {"cost": cost}
        self.cache = TieredCache(
            pool,
            BLOCK,
            registry.create("eviction", eviction),
            self.clock,
            tiers=specs,
            mover=self.mover if specs else None,
            limits=limits or MoveLimits(step_bytes=1000, link_bytes=1000, room=0.0),
            **more,
        )
        self._num_sequences = 0

    def _admission(self, name: str) -> object:
        return registry.create("admission", name)

    def sequence(self, tokens: Sequence[int]) -> Holder:
        self._num_sequences += 1
        return Holder(self._num_sequences, list(tokens))

    def admit(self, seq: Holder) -> Match:
        """Acquire what is cached."""
        match = self.cache.lookup(seq)
        self.cache.acquire(seq, match)
        return match

    def compute(self, tokens: Sequence[int]) -> Holder:
        """A sequence that has computed all its tokens."""
        seq = self.sequence(tokens)
        self.admit(seq)
        self.cache.grow(seq, len(seq.token_ids))
        seq.num_computed = len(seq.token_ids)
        self.cache.seal(seq, seq.num_computed)
        return seq

    def run(self) -> list[Move]:
        """One step's moves: poll, then begin; returns those in flight."""
        self.cache.poll()
        self.cache.write_back()
        self.cache.begin(self.cache.take_moves())
        return self.mover.moves

    def settle(self) -> None:
        """Let everything arrive."""
        while self.run():
            self.mover.end_all()
        self.cache.poll()
