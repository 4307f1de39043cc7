"""Getting blocks that lie in lower tiers into the pool: when a sequence is admitted, and before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from tierkv.cache.evictor import CPU, GPU, NVME
from tierkv.cache.holder import is_stored
from tierkv.cache.lookup import Match, is_partly_loading, loads_by_tier
from tierkv.cache.tiered_cache import TieredCache
from tierkv.engine.outputs import PromptSources
from tierkv.engine.preemption import SchedulingPolicies
from tierkv.engine.request import Request, SeqState, Sequence
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
        self._promised_s: float | None = None
        self._computing: dict[int, tuple[int, float, float]] = {}
        self._policies = policies
        self._metrics = metrics

    def choose(self, seq: Sequence, match: Match) -> tuple[Match, int]:
        """What of the match to acquire, and how many of its missing blocks to compute meanwhile."""
        self._promised_s = None
        if not match.num_loads:
            return match, 0
        if seq.state is SeqState.SWAPPED or self._cache.window is not None:
            return match, 0
        view = self._view(match)
        head = self._policies.load.choose(view).num_head
        if head >= match.num_loads:
            self._metrics.recomputes_chosen += 1
            target = len(match.blocks) * self._cache.block_size
            self._computing[seq.seq_id] = target, view.recompute_s, self._clock.now()
            return self._cache.lookup(seq, use_lower=False), 0
        self._metrics.loads_chosen += 1
        if is_partly_loading(match) or not is_stored(seq):
            head = 0  # others may bring the same blocks, whose children it would hold without them
        per_block_s = (view.load_s - view.load_latency_s) / match.num_loads
        self._promised_s = view.load_latency_s + per_block_s * (match.num_loads - head)
        return match, head

    def note_begun(self, seq: Sequence) -> None:
        """What `choose` decided for the sequence has begun."""
        if self._promised_s is not None:
            self._cache.loads.expect(seq, self._promised_s)

    def note_ended(self, running: Mapping[int, Sequence]) -> None:
        """Compare what loads and computations took with what they were expected to."""
        if self._cache.moves is None:
            return
        for promised_s, took_s in self._cache.loads.take_timed():
            self._metrics.note_load(promised_s, took_s)
        for seq_id, (target, promised_s, begun_s) in list(self._computing.items()):
            seq = running.get(seq_id)
            if seq is not None and seq.num_computed >= target:
                self._metrics.note_recompute(promised_s, self._clock.now() - begun_s)
            if seq is None or seq.num_computed >= target:
                del self._computing[seq_id]

    def note_hits(self, seq: Sequence, match: Match, num_head: int) -> None:
        """Count what a new request finds below the pool; what it finds in it comes later."""
        request = seq.request
        if request.first_scheduled_s is not None:
            return
        request.prompt_sources = sources = PromptSources()
        if not match.num_loads:
            return
        first = len(match.blocks) - match.num_loads + num_head
        counts = loads_by_tier(Match(match.blocks[first:]))
        request.num_head_tokens = num_head * self._cache.block_size
        sources.cpu = counts[CPU] * self._cache.block_size
        sources.nvme = counts[NVME] * self._cache.block_size
        self._metrics.hit_tokens_cpu += sources.cpu
        self._metrics.hit_tokens_nvme += sources.nvme

    def take_back(self, request: Request, num_tokens: int) -> None:
        """So many tokens that `note_hits` counted could not be loaded after all."""
        if (sources := request.prompt_sources) is None:
            return
        cpu, nvme = sources.cpu, sources.nvme
        sources.lose(num_tokens)
        self._metrics.hit_tokens_cpu -= cpu - sources.cpu
        self._metrics.hit_tokens_nvme -= nvme - sources.nvme

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
            prefetcher.look_anew()
        budget = prefetcher.budget(self._policies.prefetch_blocks, num_spare)
        for seq in islice(filter(self._is_prefetchable, waiting), depth):
            if budget.is_spent:
                return
            self._cache.promote(seq, budget)

    def _is_prefetchable(self, seq: Sequence) -> bool:
        if seq.state is SeqState.SWAPPED:
            return self._policies.prefetches_swapped
        return seq.state is not SeqState.SWAPPING and not seq.is_paused
