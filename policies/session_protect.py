"""Session-protect: as many conversations as fit are kept, instead of a little of all.

    member    a conversation that has come back, and whose blocks, with those of the other members,
              are at most the members' share of the tier when a request of it ends; until it has
              been idle for longer than `wait` of the recent gaps between requests
    share     shrinks by the blocks of a conversation that are computed again though LRU would have
              kept them, grows by a tenth of a conversation that comes back and that LRU would have
              lost; both as a part of the tier, within 0 and `most`
    rank      the tick of the last use, members and guests apart
    propose   a member's block if its time is over, else a guest's, else a member's; leaf first

When more conversations compete than fit, LRU evicts each just before it comes back, and all miss.
Here those that are in stay in, and the others pass through what the members leave. When all fit
nothing is gained by that, the share falls to 0, and this is LRU. LRU would have kept a conversation
if the sizes of those used since, with its own, are within the tier: its stack distance.

That a part of a working set should be protected from the rest is the idea of BIP, to measure which
side does better that of set dueling: Qureshi et al., "Adaptive Insertion Policies for High
Performance Caching", ISCA 2007.

A conversation is known by its session, or, where nobody names it, by the end of its chain in the
tier. No more of them are remembered than the tier has held blocks.
"""

from __future__ import annotations

from collections import deque

from tierkv.policies.base import AccessHint, Key
from tierkv.policies.ghosts import GhostValues
from tierkv.policies.leaf_first import Entry, LeafQueues
from tierkv.policies.samples import RecentTimes

GUESTS, MEMBERS = 0, 1
_STEP = 0.1  # of a conversation that LRU would have lost: most of these cannot be kept anyway


class Conversation:
    """A chain that grows turn by turn.

    Attributes:
        last_s: when its last request ended.
        size: blocks of its last request.
        protected: of them, those that count as a member's.
        num_missed: old blocks that the present request computes again.
    """

    __slots__ = ("is_member", "last_s", "num_missed", "protected", "size")

    def __init__(self) -> None:
        self.is_member, self.last_s = False, -1.0
        self.size = self.protected = self.num_missed = 0


class SessionProtectPolicy(LeafQueues):
    """Least recently used guests first, leaf first.

    Args:
        most: of the tier's blocks that members may have, 0 to 1.
        wait: of the gaps between requests that a member may be idle for, 0 to 1.
    """

    num_segments = 2

    def __init__(self, most: float = 0.8, wait: float = 0.9) -> None:
        if not (0 <= most <= 1 and 0 <= wait <= 1):
            raise ValueError(f"session-protect: most={most} and wait={wait} must be in 0..1")
        super().__init__()
        self.named: GhostValues[Conversation] = GhostValues()
        self._recent: GhostValues[Conversation] = GhostValues()  # by identity, oldest use first
        self._most, self._wait, self._share = most, wait, most / 2
        self._gaps = RecentTimes()
        self._now = 0.0
        self._num_protected = 0
        self._members: deque[tuple[float, Conversation]] = deque()
        self._current: Conversation | None = None
        self._neighbour: Entry | None = None  # whose use ends next, if its request's goes on

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        self._advance(hint.now)
        above = entry.parent
        known = above.use if above is not None and above.num_children == 1 else None
        found = entry.use = self._found(known, hint)
        if hint.depth < found.size:
            found.num_missed += 1
        self.place(entry, (self.tick(),), GUESTS)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        self._advance(hint.now)
        if hint.ends_use:
            if entry is not self._neighbour or self._current is None:
                self._current = self._found(entry.use, hint)
                self._ended(self._current, hint)
            self._neighbour = entry.parent
            entry.use = self._current
        self.place(entry, (self.tick(),), MEMBERS if entry.use.is_member else GUESTS)

    def _ended(self, found: Conversation, hint: AccessHint) -> None:
        """A request of the conversation ends."""
        returned = 0 <= found.last_s < hint.now
        if returned:
            self._gaps.add(hint.now - found.last_s)
            self._weigh(found)
        self._num_protected -= found.protected
        found.size, found.num_missed, found.last_s = hint.depth + 1, 0, hint.now
        room = self._share * self.peak - self._num_protected
        found.is_member = returned and found.size <= room
        found.protected = found.size if found.is_member else 0
        self._num_protected += found.protected
        if found.is_member:
            self._members.append((hint.now, found))
        self._recent.put(id(found), found, self.peak)

    def _weigh(self, found: Conversation) -> None:
        """Whether protection has done better than LRU for a conversation that is back."""
        lru_keeps = self._distance(found) <= self.peak
        if found.num_missed and lru_keeps:
            self._share = max(0.0, self._share - found.num_missed / self.peak)
        elif not lru_keeps:
            self._share = min(self._most, self._share + _STEP * found.size / self.peak)

    def _distance(self, found: Conversation) -> int:
        """Blocks of the conversations used since its last use, and its own."""
        total = found.size
        for other in self._recent.newest():
            if other is found or total > self.peak:
                break
            total += other.size
        return total

    def _found(self, known: Conversation | None, hint: AccessHint) -> Conversation:
        if not hint.session:
            return known or Conversation()
        found = self.named.pop(hint.session) or Conversation()
        self.named.put(hint.session, found, self.peak + 1)
        return found

    def choose(self, candidate: Key | None) -> int:
        oldest = self.lowest(MEMBERS)
        return MEMBERS if oldest is not None and not oldest.use.is_member else GUESTS

    def _advance(self, now: float) -> None:
        """Members whose time is over are none any more."""
        if now <= self._now:
            return
        self._now = now
        since = now - self._gaps.quantile(self._wait, now)
        while self._members and (self._members[0][0] < since or _is_old(self._members[0])):
            _, member = item = self._members.popleft()
            if not _is_old(item):
                member.is_member = False
                self._num_protected -= member.protected
                member.protected = 0


def _is_old(item: tuple[float, Conversation]) -> bool:
    """Whether the conversation went on since, or is no member any more."""
    return item[1].last_s != item[0] or not item[1].is_member
