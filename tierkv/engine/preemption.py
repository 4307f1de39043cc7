"""Taking running sequences out: for room, or so that others have their turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tierkv.cache.tiered_cache import TieredCache
from tierkv.engine.request import SeqState, Sequence
from tierkv.engine.waiting import WaitingQueue
from tierkv.errors import InvariantError
from tierkv.metrics import Metrics
from tierkv.policies.load import LoadPolicy
from tierkv.policies.preemption import Mode, PreemptionPolicy, PreemptionView
from tierkv.policies.victim import RunningView, VictimPolicy
from tierkv.protocols import Clock, CostModel


@dataclass(slots=True)
class SchedulingPolicies:
    """The scheduler's policies beside the order of admission.

    Attributes:
        victim: whom to preempt.
        mode: how, where there is a tier to swap to.
        load: what to do with a hit in a lower tier.
        cost: what moves and computation are expected to take.
        prefetch_depth: waiting sequences that are prefetched for; 0 for none.
        prefetches_swapped: whether swapped ones are among them.
        prefetch_blocks: begun in one step, at most.
        time_slice: tokens after which a sequence makes room for one that has no place; None: never.
    """

    victim: VictimPolicy
    mode: PreemptionPolicy
    load: LoadPolicy
    cost: CostModel
    prefetch_depth: int = 16
    prefetches_swapped: bool = True
    prefetch_blocks: int = 256
    time_slice: int | None = None


class Preemptor:
    """Chooses victims and the way they go; owns the step RUNNING -> (WAITING | SWAPPING).

    Args:
        cache, waiting: of the scheduler.
        running: its running sequences by id; victims leave it.
        policies, clock, metrics: of the scheduler.
    """

    def __init__(
        self,
        cache: TieredCache,
        running: dict[int, Sequence],
        waiting: WaitingQueue,
        policies: SchedulingPolicies,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._cache = cache
        self._running = running
        self._waiting = waiting
        self._policies = policies
        self._clock = clock
        self._metrics = metrics
        self.is_turn_wanted = False
        self._swapping: list[Sequence] = []

    @property
    def is_due(self) -> bool:
        """The next plan is about to take somebody out: for room, or because others want their
        turn. With a step under way it could only drop what it takes; after that step it may swap,
        or need not do it at all."""
        longest = self._longest(self._running.values()) if self.is_turn_wanted else None
        return longest is not None or self._is_crowded()

    def make_room(self) -> None:
        """Preempt until every decoding sequence can get its block, and someone can progress."""
        while self._is_crowded():
            self.preempt(self._choose_victim())

    def _is_crowded(self) -> bool:
        """Somebody has to go, and somebody else can stay."""
        return len(self._running) > 1 and not self._has_room()

    def _has_room(self) -> bool:
        """Now, or once the moves in flight have freed what they read."""
        if self._cache.num_available >= len(self._running):
            return True  # a step asks for at most one block for each
        available = self._cache.num_available + self._cache.num_leaving
        need = can_progress = is_stuck = 0
        for seq in self._running.values():
            remaining = seq.num_to_compute
            if remaining:
                blocks = self._cache.blocks_to_grow(seq, seq.num_computed + 1)
                need += blocks if remaining == 1 else 0
                can_progress += remaining == 1 or blocks <= available
                is_stuck = 1
        return need <= available and bool(can_progress or not is_stuck)

    def end_standstill(self) -> None:
        """Nothing could be planned and nothing is under way: of the sequences that wait for their
        caller's next token, one makes room for those that wait for room.

        Raises:
            InvariantError: a sequence that runs could have gone on.
        """
        if any(seq.num_to_compute for seq in self._running.values()):
            raise InvariantError("sequences are runnable but none can be planned")
        paused = [self._running_view(s) for s in self._running.values() if s.is_paused]
        if paused and any(not seq.is_paused for seq in self._waiting):
            self.preempt(self._running[self._policies.victim.choose(paused)])

    def take_turns(self) -> None:
        """When someone was kept out for lack of room: whoever has had its time slice makes some.

        Called before a step is planned, while no row of a victim can be part of one.
        """
        is_wanted, self.is_turn_wanted = self.is_turn_wanted, False
        settled = [seq for seq in self._running.values() if not seq.num_uncommitted]
        longest = self._longest(settled) if is_wanted else None
        if longest is not None:
            longest.queued_s = self._clock.now()  # behind those that wait already
            self.preempt(longest, Mode.SWAP)

    def _longest(self, sequences: Iterable[Sequence]) -> Sequence | None:
        """Who has had most of its turn, if that was a time slice or more."""
        least = self._policies.time_slice
        if least is None or len(self._running) < 2:
            return None
        had = [seq for seq in sequences if not seq.load_tokens]
        longest = max(had, key=_turn, default=None)
        return longest if longest is not None and _turn(longest) >= least else None

    def stop_all(self, loading: dict[int, Sequence]) -> None:
        """All that runs or is loaded goes back to the queue; swapped, where that is possible."""
        for seq in list(self._running.values()):
            is_mixed = seq.load_tokens or seq.num_uncommitted or self._cache.lower is None
            self.preempt(seq, Mode.RECOMPUTE if is_mixed else Mode.SWAP)
        for seq in list(loading.values()):
            del loading[seq.seq_id]
            self._cache.release(seq)
            seq.move_to(SeqState.WAITING)
            seq.epoch += 1
            self._waiting.add(seq)

    def preempt(self, seq: Sequence, mode: Mode | None = None) -> None:
        """Back to the queue; its full blocks stay in the cache as long as there is room."""
        if mode is None:
            mode = self._choose_mode(seq)
        if seq.hints is not None and seq.hints.no_store:
            mode = Mode.RECOMPUTE  # nothing of it goes to another tier
        del self._running[seq.seq_id]
        if mode is Mode.SWAP:
            self._cache.swap_out(seq)
            seq.move_to(SeqState.SWAPPING)
            self._swapping.append(seq)
            self._metrics.swaps += 1
        else:
            self._cache.release(seq)
            seq.move_to(SeqState.WAITING)
        seq.epoch += 1
        seq.request.num_preemptions += 1
        self._waiting.add(seq)
        self._metrics.preemptions += 1

    def finish_swaps(self) -> None:
        """SWAPPING -> SWAPPED for sequences whose tail has gone down."""
        still = []
        for seq in self._swapping:
            if seq.state is SeqState.SWAPPING and self._is_under_way(seq):
                still.append(seq)
            elif seq.state is SeqState.SWAPPING:
                seq.move_to(SeqState.SWAPPED)
        self._swapping = still

    def _is_under_way(self, seq: Sequence) -> bool:
        return self._cache.swapper is not None and self._cache.swapper.is_under_way(seq)

    def _choose_mode(self, seq: Sequence) -> Mode:
        if self._cache.lower is None or seq.load_tokens or seq.num_uncommitted:
            return Mode.RECOMPUTE
        return self._policies.mode.choose(self._view(seq))

    def _view(self, seq: Sequence) -> PreemptionView:
        return PreemptionView(self._swap_s(seq), self._recompute_s(seq))

    def _recompute_s(self, seq: Sequence) -> float:
        return self._policies.cost.compute_s(0, seq.num_computed)

    def _swap_s(self, seq: Sequence) -> float:
        swapper, lower, cost = self._cache.swapper, self._cache.lower, self._policies.cost
        if swapper is None or lower is None:
            return float("inf")
        down, up = swapper.num_blocks(seq)
        return cost.down_s(lower.below_pool, down) + cost.up_s(lower.below_pool, up)

    def _running_view(self, seq: Sequence) -> RunningView:
        request = seq.request
        return RunningView(
            seq.seq_id,
            request.priority,
            request.arrival_s,
            seq.scheduled_order,
            len(seq.block_table),
            seq.num_tokens,
            recompute_s=self._recompute_s(seq),
            swap_s=self._swap_s(seq),
        )

    def _choose_victim(self) -> Sequence:
        """By policy, among all but the sequence admitted first."""
        oldest = min(self._running.values(), key=lambda s: s.scheduled_order)
        views = [self._running_view(s) for s in self._running.values() if s is not oldest]
        return self._running[self._policies.victim.choose(views)]


def _turn(seq: Sequence) -> int:
    """Tokens since it began to run."""
    return seq.num_tokens - seq.admitted_tokens
