"""Retention: what a tool call interrupted is held back until the tool has most likely returned.

    touch     rank = now + ttl[stop reason]: as if it had been used that much later
    ttl       after a tool call: the time in which `share` of such chains came back, among the last
              256; otherwise 0
    propose   leaves by rising rank (`leaf_first`)

So a block that a tool call left behind stays while blocks of finished turns go, and joins the
common order by last use when its time is over. Times of return are learned from blocks in the tier
and from ghosts of those that were evicted, as many as the tier has held blocks.

After Li et al., "Continuum: Efficient and Robust Multi-Turn LLM Agent Scheduling with KV Cache
Time-to-Live", 2025, which pins for a time to live found from the tool and what a reload costs; here
nothing is pinned: if all are held back, the one whose time is over first goes.
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint, Why
from tierkv.policies.ghosts import GhostValues
from tierkv.policies.leaf_first import Entry, LeafQueues
from tierkv.policies.samples import RecentTimes

TOOL_CALL = "tool_call"


class RetentionPolicy(LeafQueues):
    """Least recently used, tool calls held back, leaf first.

    Args:
        share: of the tools' returns that are waited for, 0 to 1.
    """

    def __init__(self, share: float = 0.9) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"retention: share={share} must be in 0..1")
        super().__init__()
        self.ghosts: GhostValues[float] = GhostValues()
        self._share = share
        self._returns = RecentTimes()
        self._sampled_s = -1.0

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        left_s = self.ghosts.pop(entry.key)
        if left_s is not None:
            self._sample(left_s, hint.now)
        self._used_at(entry, hint)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        if entry.use is not None and not hint.ends_use:
            self._sample(entry.use, hint.now)
        self._used_at(entry, hint)

    def _used_at(self, entry: Entry, hint: AccessHint) -> None:
        """`use` is when a tool call left the block behind, None if none did."""
        entry.use = hint.now if hint.stop_reason == TOOL_CALL else None
        ttl_s = self._returns.quantile(self._share, 0.0) if entry.use is not None else 0.0
        self.place(entry, (hint.now + ttl_s, self.tick()))

    def _sample(self, left_s: float, now: float) -> None:
        """A chain is back: one sample, however many blocks it has."""
        if left_s != self._sampled_s:
            self._sampled_s = left_s
            self._returns.add(now - left_s)

    def left(self, entry: Entry, why: Why) -> None:
        if why is Why.EVICTED and entry.use is not None:
            self.ghosts.put(entry.key, entry.use, self.peak)
