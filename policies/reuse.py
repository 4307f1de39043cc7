"""Reuse: learn when blocks of a kind come again, and give up those that are worth least room.

    kind      of a use of a block, from what the engine knows when it ends:
                  stop     the request's stop reason: unknown, end, tool call
                  gap      how long ago the chain that the request continues was used before, as
                           a quarter of the recent gaps; or none, as far as one can see: a new
                           conversation. Of a shared block: how long ago it itself was used
                  part     fresh (computed by this request), reused, or shared by several chains
    learn     a use ends: the block is watched, in its tier or (by its key, for as long as ghosts
              reach) out of it, until it is used again; `reuse_curves` counts at which age
    rank      worth[kind][age], then the end of the last use: hits per second of room
    propose   leaves by rising rank (`leaf_first`)

Blocks of one chain that one request used last are one `Use`: they have kind and age in common, so
the worth of all is one number, which changes only when the age enters another band or the curves
are learned anew. Session ids are not needed: a request that finds the end of a chain that no other
has branched from, in the tier or among ghosts, continues it.

A ghost is kept for every fourth block of a chain that leaves from its tail on, and stands for the
blocks above it too: whoever uses one uses its ancestors. Ghosts are at most twice the blocks that
the tier has held.

Sources: the index is Gittins's (1979), as in `reuse_curves`; classes learned online and no
training come from LHD (Beckmann et al., NSDI 2018); stop reasons as predictors from Continuum (Li
et al. 2025); kinds of requests from "KVCache Cache in the Wild" (Wang et al., ATC 2025).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf

from tierkv.policies.base import AccessHint, Key, Why
from tierkv.policies.ghosts import GhostValues
from tierkv.policies.leaf_first import Entry, LeafQueues, Rank
from tierkv.policies.reuse_curves import NUM_BANDS, ReuseCurves, band_of, end_of
from tierkv.policies.samples import RecentTimes

FRESH, REUSED, SHARED = range(3)
_STOPS = {"end": 1, "tool_call": 2}
_NUM_STOPS, _NUM_GAPS, _NUM_PARTS = 3, 5, 3
_QUARTERS = (0.25, 0.5, 0.75)
_GHOST_EVERY = 4


class Use:
    """The blocks of a chain that one request used last.

    Attributes:
        blocks: how many are watched, those that ghosts stand for included.
        gap_s: age of the use before this one, negative when none is known.
        leaves: those of its blocks that could go now, oldest first.
        ghost: the last one that was made of its blocks.
    """

    __slots__ = ("band", "blocks", "gap_s", "ghost", "kind", "leaves", "number", "rank", "time_s")

    def __init__(self, kind: int, time_s: float, number: int, worth: float, gap_s: float) -> None:
        self.kind, self.time_s, self.number, self.gap_s = kind, time_s, number, gap_s
        self.band = self.blocks = 0
        self.rank: Rank = (worth, number)
        self.leaves: dict[Entry, None] = {}
        self.ghost: Ghost | None = None


class Ghost:
    """Blocks that are gone, watched by the key of the deepest."""

    __slots__ = ("count", "use")

    def __init__(self, use: Use) -> None:
        self.use, self.count = use, 1


class ReusePolicy(LeafQueues):
    """Least hits per second of room, leaf first.

    Args:
        prior: uses of any kind that stand in for what is not known of one, above 0.
        fade: uses after which what was learned counts half, at least 1.
    """

    def __init__(self, prior: float = 3.0, fade: float = 200_000.0) -> None:
        if prior <= 0 or fade < 1:
            raise ValueError(f"reuse: prior={prior} must be above 0, fade={fade} at least 1")
        super().__init__()
        self.ghosts: GhostValues[Ghost] = GhostValues()
        self._curves = ReuseCurves(_NUM_STOPS * _NUM_GAPS * _NUM_PARTS)
        self._prior, self._fade = prior, fade
        self._now = 0.0
        self._due: list[tuple[float, int, Use]] = []
        self._num_uses = self._refreshed_at = 0
        self._gaps = RecentTimes()
        self._quarters: list[float] = []
        self._use: Use | None = None  # what the blocks touched last belong to
        self._old: Use | None = None  # and belonged to before
        self._verb = ""
        self._neighbour: Entry | None = None  # the block that may join them

    # ------------------------------------------------------------------ what happens to blocks

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        if hint.now > self._now:
            self._advance(hint.now)
        above, use = entry.parent, self._use
        if above is not None and above.num_children > 1:
            above.uses = SHARED
        if use is None or self._verb != "insert" or above is not self._neighbour or above is None:
            continues = above is not None and above.uses != SHARED
            gap_s = above.use.gap_s if above is not None and continues else -1.0
            use = self._begin("insert", gap_s, FRESH, hint)
        ghost = self.ghosts.pop(entry.key)
        if ghost is not None:
            entry.uses = REUSED
            self._came_back(ghost, use)
        entry.use, self._neighbour = use, entry
        use.blocks += 1
        self._curves.entered[use.kind][0] += 1

    def _came_back(self, ghost: Ghost, use: Use) -> None:
        old = ghost.use
        self._curves.reused[old.kind][old.band] += ghost.count
        old.blocks -= ghost.count
        if old.ghost is ghost:
            old.ghost = None
        if use.gap_s < 0:
            self._gaps.add(self._now - old.time_s)
        use.gap_s = self._now - old.time_s

    def used(self, entry: Entry, hint: AccessHint) -> None:
        self._used_all([entry], hint)

    def touch_chain(self, keys: Sequence[Key], hint: AccessHint) -> None:
        """See `EvictionPolicy`."""
        self._used_all([self.entries[key] for key in keys], hint)

    def _used_all(self, entries: Sequence[Entry], hint: AccessHint) -> None:
        if hint.now > self._now:
            self._advance(hint.now)
        first = 0
        while first < len(entries):
            entry, old = entries[first], entries[first].use
            count = _num_alike(entries, first)
            if hint.ends_use:
                use, part = self._ended(entry, count, hint), entry.uses
            else:
                use, part = self._reused(entry, count, hint), entry.uses or REUSED
            for entry in islice(entries, first, first + count):
                entry.use, entry.uses = use, part
                if entry.version:
                    old.leaves.pop(entry, None)
                    use.leaves[entry] = None
                    self.place(entry, use.rank)
            old.blocks -= count
            use.blocks += count
            self._curves.entered[use.kind][0] += count
            self._old, self._neighbour = old, entry.parent
            first += count

    def _reused(self, entry: Entry, count: int, hint: AccessHint) -> Use:
        """So many blocks, `entry` the deepest, are used again; returns what they belong to now."""
        old, use, part = entry.use, self._use, entry.uses or REUSED
        if use is None or self._verb != "touch" or self._is_apart(entry, part):
            gap_s = self._now - old.time_s
            self._gaps.add(gap_s)
            use = self._begin("touch", gap_s, part, hint)
        self._curves.reused[old.kind][old.band] += count
        return use

    def _ended(self, entry: Entry, count: int, hint: AccessHint) -> Use:
        """As `_reused`. Their last use was none that ended at its beginning: it is not counted."""
        old, use, part = entry.use, self._use, entry.uses
        if use is None or self._verb != "end" or self._is_apart(entry, part):
            use = self._begin("end", old.gap_s, part, hint)
        elif part > use.kind % _NUM_PARTS:
            use = self._begin("end", use.gap_s, part, hint)
        counts = self._curves.entered[old.kind]
        for band in range(old.band + 1):
            counts[band] -= count
        return use

    def _is_apart(self, entry: Entry, part: int) -> bool:
        """Whether it is no part of the chain, or a shared one with a last use of its own."""
        return entry is not self._neighbour or (part == SHARED and entry.use is not self._old)

    def freed(self, entry: Entry) -> None:
        use = entry.use
        use.leaves[entry] = None
        entry.rank = use.rank

    def left(self, entry: Entry, why: Why) -> None:
        use = entry.use
        use.leaves.pop(entry, None)
        if self._neighbour is entry:
            self._neighbour = self._use = None
        if why is not Why.EVICTED:
            use.blocks -= 1
        elif use.ghost is not None and use.ghost.count < _GHOST_EVERY:
            use.ghost.count += 1
        else:
            use.ghost = Ghost(use)
            for gone in self.ghosts.put(entry.key, use.ghost, 2 * self.peak):
                gone.use.blocks -= gone.count
                if gone.use.ghost is gone:
                    gone.use.ghost = None

    # ------------------------------------------------------------------ uses and their ages

    def _begin(self, verb: str, gap_s: float, part: int, hint: AccessHint) -> Use:
        stop = _STOPS.get(hint.stop_reason, 0)
        kind = (stop * _NUM_GAPS + self._bucket(gap_s)) * _NUM_PARTS + part
        self._num_uses += 1
        worth = self._curves.worth[kind][0]
        use = self._use = Use(kind, self._now, self._num_uses, worth, gap_s)
        self._verb = verb
        heappush(self._due, (self._now + end_of(0), use.number, use))
        if len(self._due) > 2 * (len(self.entries) + len(self.ghosts)) + 64:
            self._due = self._watched()
        return use

    def _watched(self) -> list[tuple[float, int, Use]]:
        """The heap of uses without those that have no block left."""
        watched = [item for item in self._due if item[2].blocks > 0]
        heapify(watched)
        return watched

    def _bucket(self, gap_s: float) -> int:
        """0 for no gap, else its quarter from 1 on, the shortest first."""
        return 0 if gap_s < 0 else 1 + bisect_right(self._quarters, gap_s)

    def _advance(self, now: float) -> None:
        """It is later: the ages of some uses are in another band."""
        self._now, self._neighbour = now, None
        due = self._due
        while due and due[0][0] <= now:
            use = heappop(due)[2]
            if use.blocks > 0:
                self._grow_older(use)
        if self._num_uses - self._refreshed_at > 16 + len(due) // 8:
            self._refresh()

    def _grow_older(self, use: Use) -> None:
        """Its band is over; where rounding does not say so, it is nevertheless."""
        entered = self._curves.entered[use.kind]
        last = max(use.band + 1, band_of(self._now - use.time_s))
        for band in range(use.band + 1, last + 1):
            entered[band] += use.blocks
        use.band = last
        self._rank(use)
        ends_s = use.time_s + end_of(use.band) if use.band < NUM_BANDS - 1 else inf
        heappush(self._due, (ends_s, use.number, use))

    def _rank(self, use: Use) -> None:
        rank = (self._curves.worth[use.kind][use.band], use.number)
        if rank != use.rank:
            use.rank = rank
            for entry in [*use.leaves]:
                if entry.version:
                    self.place(entry, rank)
                else:
                    del use.leaves[entry]

    def _refresh(self) -> None:
        """Learn the curves anew, and rank by them."""
        watched = self._due = self._watched()
        num_blocks = sum(use.blocks for _, _, use in watched)
        prior = self._prior * num_blocks / max(1, len(watched)) + 1.0
        self._curves.refresh(prior, 0.5 ** ((self._num_uses - self._refreshed_at) / self._fade))
        self._refreshed_at = self._num_uses
        self._quarters = self._gaps.quantiles(_QUARTERS)
        for _, _, use in watched:
            self._rank(use)


def _num_alike(entries: Sequence[Entry], first: int) -> int:
    """How many blocks from `first` on are a chain of one use and one part."""
    use, part = entries[first].use, entries[first].uses
    neighbour: Entry | None = entries[first]
    for index in range(first, len(entries)):
        entry = entries[index]
        if entry is not neighbour or entry.use is not use or entry.uses != part:
            return index - first
        neighbour = entry.parent
    return len(entries) - first
