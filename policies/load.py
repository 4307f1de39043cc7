"""For a prefix that lies in a lower tier: load it, compute it again, or both at once?

load       all of it
recompute  nothing of it
split      the sequence computes the head while the tail is loaded (Cake: Jin et al., "Compute or
           Load KV Cache? Why Not Both?", ICML 2025); the cut is where both end together
auto       whichever of the three the cost model expects to end first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, frozen=True)
class LoadView:
    """What a policy may know of a hit in a lower tier.

    Attributes:
        num_blocks: blocks that are not in the pool, at least 1.
        load_s: estimated seconds until all of them are, queues included.
        recompute_s: estimated seconds to compute them.
        load_latency_s: the part of `load_s` that does not depend on how many there are.
    """

    num_blocks: int
    load_s: float
    recompute_s: float
    load_latency_s: float = 0.0


@dataclass(slots=True, frozen=True)
class LoadChoice:
    """Of the blocks that are not in the pool the first `num_head` are computed, the rest loaded."""

    num_head: int


class LoadPolicy(Protocol):
    """Chooses how to get the blocks that are not in the pool."""

    def choose(self, view: LoadView) -> LoadChoice: ...


class AlwaysLoad:
    """Load all."""

    def choose(self, view: LoadView) -> LoadChoice:
        return LoadChoice(0)


class AlwaysRecompute:
    """Compute all."""

    def choose(self, view: LoadView) -> LoadChoice:
        return LoadChoice(view.num_blocks)


class Split:
    """Compute the head while the tail is loaded."""

    def choose(self, view: LoadView) -> LoadChoice:
        return LoadChoice(split_point(view))


class Auto:
    """The cheapest by the cost model.

    Args:
        least_gain: split only if it ends at least this share earlier than the better of the two.
    """

    def __init__(self, least_gain: float = 0.2) -> None:
        self._least_gain = least_gain

    def choose(self, view: LoadView) -> LoadChoice:
        better = min(view.load_s, view.recompute_s)
        head = split_point(view)
        split_s = max(_compute_s(view, head), _tail_s(view, head))
        if 0 < head < view.num_blocks and split_s < better * (1 - self._least_gain):
            return LoadChoice(head)
        return LoadChoice(0 if view.load_s <= view.recompute_s else view.num_blocks)


def split_point(view: LoadView) -> int:
    """The head that takes as long to compute as the rest takes to load.

    Both are taken as proportional to the number of blocks: with rates c and l per block,
    head * c == latency + (n - head) * l.
    """
    n = view.num_blocks
    compute = view.recompute_s / n
    load = max(0.0, view.load_s - view.load_latency_s) / n
    if compute + load <= 0:
        return 0
    head = (view.load_latency_s + n * load) / (compute + load)
    return min(n, max(0, int(head)))


def _compute_s(view: LoadView, head: int) -> float:
    return view.recompute_s * head / view.num_blocks


def _tail_s(view: LoadView, head: int) -> float:
    rest = (view.num_blocks - head) / view.num_blocks
    return view.load_latency_s + (view.load_s - view.load_latency_s) * rest
