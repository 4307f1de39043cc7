"""Sleep: the pool's KV goes down, its memory back to the system, and requests wait.

    AWAKE -> FALLING    running sequences are swapped out, what no lower tier has is sent down
    FALLING -> ASLEEP   nothing moves any more: the pool is emptied and its memory given back
    any -> AWAKE        steps go on; what is wanted comes up again

What the tiers below do not take, and everything where there is none, is computed again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from tierkv.cache.evictor import GPU
from tierkv.cache.lookup import lower_tier
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState
from tierkv.cache.tiered_cache import TieredCache
from tierkv.engine.scheduler import Scheduler
from tierkv.policies.base import Why


class SleepState(enum.Enum):
    """How far the engine is from working."""

    AWAKE = "awake"
    FALLING = "falling asleep"
    ASLEEP = "asleep"


class Sleeper:
    """Puts one engine to sleep.

    Args:
        cache, scheduler: of the engine.
        give_back: gives the memory of the pool, all of whose slots are empty, to the system;
            returns bytes.

    Attributes:
        state: whether steps are made.
        bytes_given_back: when it fell asleep last.
    """

    def __init__(
        self, cache: TieredCache, scheduler: Scheduler, give_back: Callable[[], int]
    ) -> None:
        self.state = SleepState.AWAKE
        self.bytes_given_back = 0
        self._cache = cache
        self._scheduler = scheduler
        self._give_back = give_back
        self._moved = self._most_moved = 0

    def begin(self) -> None:
        """Stop; `advance` does the rest. Nothing happens if it sleeps already."""
        if self.state is SleepState.AWAKE:
            self.state = SleepState.FALLING
            self._scheduler.stop_all()
            self._moved = self._num_moved()
            self._most_moved = self._moved + 2 * self._send_down()

    def wake(self) -> None:
        """Go on; also before it is asleep."""
        self.state = SleepState.AWAKE
        if self._cache.lower is not None:
            self._cache.lower.is_urgent = False

    def advance(self) -> None:
        """Fall asleep once nothing moves; what was turned away is sent again as long as that moves
        something, and not all of it twice."""
        if self.state is not SleepState.FALLING or self._cache.has_background_work:
            return
        moved = self._num_moved()
        has_progressed, self._moved = moved > self._moved, moved
        if has_progressed and moved < self._most_moved and self._send_down():
            return
        if self._cache.lower is not None:
            self._cache.lower.clear_offers()
        self._cache.pool.evict(self._cache.evictors[GPU].num_evictable, Why.EVICTED)
        if self._cache.num_empty == self._cache.num_blocks:
            self.state = SleepState.ASLEEP
            self.bytes_given_back = self._give_back()

    def _num_moved(self) -> int:
        moves = self._cache.moves
        return 0 if moves is None else sum(stats.num_moves for stats in moves.stats.values())

    def _send_down(self) -> int:
        """Offer what only the pool has, parents first; returns how much that is."""
        lower = self._cache.lower
        if lower is None:
            return 0
        lower.is_urgent = True
        missing = sorted((b for b in self._cache.tree if _is_only_here(b)), key=_depth)
        first, last = lower.below_pool, [*lower.specs][-1]
        num_empty = self._cache.residency.tiers[first].num_empty
        for index, block in enumerate(missing):
            lower.insist(block, first if index < num_empty else last)
        return len(missing)


def _is_only_here(block: Block) -> bool:
    copy = block.copies.get(GPU)
    is_ready = copy is not None and copy.state is CopyState.READY
    return is_ready and lower_tier(block) is None


def _depth(block: Block) -> int:
    return block.depth
