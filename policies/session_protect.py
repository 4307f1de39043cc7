"""Session-protect: as many conversations as fit are kept, instead of a little of all.

    member    a conversation whose blocks, with those of the other members, are at most `share` of
              the tier when a request of it ends; until it has been idle for longer than `wait` of
              the recent gaps between its kind's requests
    rank      the tick of the last use, members and guests apart
    propose   a member's block if its time is over, else a guest's, else a member's; leaf first

When more conversations compete than fit, LRU evicts each just before it comes back, and all miss.
Here those that are in stay in, and the others pass through what the members leave. When all fit,
all are members, and this is LRU. (The idea of protecting a part of a cyclic working set is that of
BIP: Qureshi et al., "Adaptive Insertion Policies for High Performance Caching", ISCA 2007.)

A conversation is known by its session, or, where nobody names it, by the end of its chain in the
tier; its gaps count when it was evicted meanwhile only if it is named. So many sessions are
remembered as the tier has held blocks, and no more than that.
"""

from __future__ import annotations

from collections import deque

from tierkv.policies.base import AccessHint, Key
from tierkv.policies.ghosts import GhostValues
from tierkv.policies.leaf_first import Entry, LeafQueues
from tierkv.policies.samples import RecentTimes

GUESTS, MEMBERS = 0, 1


class Conversation:
    """A chain that grows turn by turn. `size` is that of its blocks while it is a member."""

    __slots__ = ("is_member", "last_s", "size")

    def __init__(self, now: float) -> None:
        self.is_member, self.last_s, self.size = False, now, 0


class SessionProtectPolicy(LeafQueues):
    """Least recently used guests first, leaf first.

    Args:
        share: of the tier's blocks that members may have, 0 to 1.
        wait: of the gaps between requests that a member may be idle for, 0 to 1.
    """

    num_segments = 2

    def __init__(self, share: float = 0.8, wait: float = 0.9) -> None:
        if not (0 <= share <= 1 and 0 <= wait <= 1):
            raise ValueError(f"session-protect: share={share} and wait={wait} must be in 0..1")
        super().__init__()
        self.named: GhostValues[Conversation] = GhostValues()
        self._share, self._wait = share, wait
        self._gaps = RecentTimes()
        self._now = 0.0
        self._num_protected = 0
        self._members: deque[tuple[float, Conversation]] = deque()
        self._current: Conversation | None = None
        self._neighbour: Entry | None = None  # whose use ends next, if its request's goes on

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        self._advance(hint.now)
        above = entry.parent
        shares = above is not None and above.num_children == 1
        entry.use = above.use if above is not None and shares else self._found(None, hint)
        self.place(entry, (self.tick(),), GUESTS)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        self._advance(hint.now)
        if hint.ends_use:
            if entry is not self._neighbour or self._current is None:
                self._current = self._ended(entry, hint)
            self._neighbour = entry.parent
            entry.use = self._current
        self.place(entry, (self.tick(),), MEMBERS if entry.use.is_member else GUESTS)

    def _ended(self, entry: Entry, hint: AccessHint) -> Conversation:
        """A request ends, whose last block this is."""
        found = self._found(entry.use, hint)
        returned = found.last_s < hint.now
        if returned:
            self._gaps.add(hint.now - found.last_s)
        size = hint.depth + 1
        room = self._share * self.peak - self._num_protected
        if found.is_member:
            room += found.size
            self._num_protected -= found.size
        found.is_member = returned and size <= room
        if found.is_member:
            found.size = size
            self._num_protected += size
            self._members.append((hint.now, found))
        found.last_s = hint.now
        return found

    def _found(self, known: Conversation | None, hint: AccessHint) -> Conversation:
        if not hint.session:
            return known or Conversation(hint.now)
        found = self.named.pop(hint.session) or Conversation(hint.now)
        self.named.put(hint.session, found, self.peak + 1)
        return found

    def choose(self, candidate: Key | None) -> int:
        oldest = self.lowest(MEMBERS)
        if oldest is not None and not oldest.use.is_member:
            return MEMBERS
        return GUESTS

    def _advance(self, now: float) -> None:
        """Members whose time is over are none any more."""
        if now <= self._now:
            return
        self._now = now
        since = now - self._gaps.quantile(self._wait, now)
        while self._members and (self._members[0][0] < since or self._is_old(self._members[0])):
            _, member = item = self._members.popleft()
            if not self._is_old(item):
                member.is_member = False
                self._num_protected -= member.size

    def _is_old(self, item: tuple[float, Conversation]) -> bool:
        """Whether the conversation went on since, or is no member any more."""
        return item[1].last_s != item[0] or not item[1].is_member
