"""May a block enter the tier below, and when?

write-through  at once: when it is READY above; asked again (at its uses, at its eviction) as long
               as it is not below, because a busy tier may have turned it away
write-back     when it is evicted above
prompt-only    write-through of what prompts hold; what is generated is not written
second-hit     when it is requested for the second time, or evicted after that

What is written and never read wears flash for nothing; second-hit spares it the blocks that only
one request wants ("cache on second hit": Maggs and Sitaraman, "Algorithmic Nuggets in Content
Delivery", CCR 2015). `ByteRateLimit` bounds the bytes, whatever the policy admits.
"""

from __future__ import annotations

import enum
from math import inf
from typing import Protocol

from tierkv.policies.base import AccessHint, Key


class When(enum.Enum):
    """What just happened to the block in the tier above."""

    READY = "ready"  # its copy appeared: it was computed, or fetched from elsewhere
    USED = "used"  # it was hit
    EVICTED = "evicted"  # it is about to be dropped


class AdmissionPolicy(Protocol):
    """Decides for one tier which blocks the tier above writes to it."""

    def admits(self, key: Key, when: When, hint: AccessHint) -> bool:
        """Whether the block, which has no copy in the tier, is written to it now.

        Called at every such event; a yes that the tier cannot follow may be asked again later.
        """
        ...


class WriteThrough:
    """Every block as soon as possible."""

    def admits(self, key: Key, when: When, hint: AccessHint) -> bool:
        return True


class PromptOnly:
    """Every block of a prompt as soon as possible; a generated one once it comes back in one."""

    def admits(self, key: Key, when: When, hint: AccessHint) -> bool:
        return when is not When.EVICTED and not hint.is_output


class WriteBack:
    """Every block when it leaves the tier above."""

    def admits(self, key: Key, when: When, hint: AccessHint) -> bool:
        return when is When.EVICTED


class SecondHit:
    """A block from its second request on; that it was computed for a request is the first.

    Args:
        hits: requests it takes.
        memory: keys remembered, those requested least recently are forgotten first.
    """

    def __init__(self, hits: int = 2, memory: int = 1 << 17) -> None:
        if hits < 1 or memory < 1:
            raise ValueError(f"second-hit: hits={hits} and memory={memory} must be above 0")
        self._hits, self._memory = hits, memory
        self._seen: dict[Key, int] = {}

    def admits(self, key: Key, when: When, hint: AccessHint) -> bool:
        if when is When.EVICTED:
            return self._seen.get(key, 0) >= self._hits
        count = self._seen.pop(key, 0) + 1
        self._seen[key] = count
        if len(self._seen) > self._memory:
            del self._seen[next(iter(self._seen))]
        return count >= self._hits


class ByteRateLimit:
    """A token bucket of bytes, against flash wear. It starts full.

    Args:
        bytes_per_s: how fast it fills.
        burst_bytes: what it holds; one write may be larger, and is then paid off before the next.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float) -> None:
        if not bytes_per_s > 0 or not burst_bytes > 0:
            raise ValueError(f"{bytes_per_s=} and {burst_bytes=} must be above 0")
        self._rate, self._burst = bytes_per_s, burst_bytes
        self._level = burst_bytes
        self._filled_at = -inf

    def take(self, num_bytes: int, now: float) -> bool:
        """Whether `num_bytes` may be written at `now` (seconds, not falling); takes them if so."""
        if now > self._filled_at:
            filled = self._rate * (now - self._filled_at)
            self._level = min(self._burst, self._level + filled)
            self._filled_at = now
        if self._level < min(num_bytes, self._burst):
            return False
        self._level -= num_bytes
        return True
