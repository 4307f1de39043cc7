"""Getting blocks that lie in lower tiers into the pool: when a sequence is admitted, and before."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from tierkv.cache.evictor import CPU, GPU, NVME
from tierkv.cache.lookup import Match, is_partly_loading, loads_by_tier
from tierkv.cache.tiered_cache import TieredCache
from tierkv.engine.preemption import SchedulingPolicies
from tierkv.engine.request import SeqState, Sequence
from tierkv.metrics import Metrics
from tierkv.policies.load import LoadView
from tierkv.protocols import Clock
from tierkv.types import TierName

_LOOK_AGAIN_S = 0.05  # at the whole queue


class Loader:
    """Chooses between loading and computing, and prefetches for the queue.

    Args:
        cache, policies, clock, metrics: of the scheduler.
    """

    def __init__(
        self, cache: TieredCache, policies: SchedulingPolicies, clock: Clock, metrics: Metrics
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._look_again_s = float("-inf")
        self._policies = policies
        self._metrics = metrics

    def choose(self, seq: Sequence, match: Match) -> tuple[Match, int]:
        """What of the match to acquire, and how many of its missing blocks to compute meanwhile."""
        if not match.num_loads:
            return match, 0
        if seq.state is SeqState.SWAPPED or self._cache.window is not None:
            return match, 0
        head = self._policies.load.choose(self._view(match)).num_head
        if head >= match.num_loads:
            self._metrics.recomputes_chosen += 1
            return self._cache.lookup(seq, use_lower=False), 0
        self._metrics.loads_chosen += 1
        return match, 0 if is_partly_loading(match) else head

    def note_hits(self, seq: Sequence, match: Match, num_head: int) -> None:
        """Count what a new request finds below the pool."""
        if not match.num_loads or seq.request.first_scheduled_s is not None:
            return
        first = len(match.blocks) - match.num_loads + num_head
        counts = loads_by_tier(Match(match.blocks[first:]))
        self._metrics.hit_tokens_cpu += counts[CPU] * self._cache.block_size
        self._metrics.hit_tokens_nvme += counts[NVME] * self._cache.block_size

    def _view(self, match: Match) -> LoadView:
        cost, block_size = self._policies.cost, self._cache.block_size
        start = (len(match.blocks) - match.num_loads) * block_size
        counts = loads_by_tier(match)
        load_s = sum(cost.up_s(tier, n + self._num_queued(tier)) for tier, n in counts.items())
        latency = max((cost.up_s(tier, 0) for tier in counts), default=0.0)
        return LoadView(
            match.num_loads, load_s, cost.compute_s(start, match.num_loads * block_size), latency
        )

    def _num_queued(self, tier: TierName) -> int:
        """Blocks that are on their way up from `tier` already."""
        moves = self._cache.moves
        return 0 if moves is None else moves.in_flight_bytes[tier, GPU] // moves.slot_bytes

    def prefetch(self, waiting: Iterable[Sequence], num_spare: int) -> None:
        """Promote blocks of the sequences that are next, before their turn.

        In every step for the first in the queue, for those behind it every now and then.
        """
        prefetcher, depth = self._cache.prefetcher, self._policies.prefetch_depth
        if prefetcher is None or not depth:
            return
        now = self._clock.now()
        if now < self._look_again_s:
            depth = 1
        else:
            self._look_again_s = now + _LOOK_AGAIN_S
        budget = prefetcher.budget(self._policies.prefetch_blocks, num_spare)
        for seq in islice(filter(self._is_prefetchable, waiting), depth):
            if budget.is_spent:
                return
            prefetcher.promote(self._cache.lookup(seq), budget)

    def _is_prefetchable(self, seq: Sequence) -> bool:
        if seq.state is SeqState.SWAPPED:
            return self._policies.prefetches_swapped
        return seq.state is not SeqState.SWAPPING and not seq.is_paused
