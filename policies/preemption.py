"""How to preempt a running sequence: may its blocks be lost, or do they go down first?

recompute  it releases its blocks; what the cache drops of them is computed again
swap       what no lower tier holds goes down before the slots are given away
auto       swap if the cost model expects that to be cheaper
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol


class Mode(enum.Enum):
    """What happens to the blocks of a preempted sequence."""

    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(slots=True, frozen=True)
class PreemptionView:
    """What a policy may know of the victim.

    Attributes:
        swap_s: estimated seconds to move down what is not below, and all of it up again.
        recompute_s: estimated seconds to compute its tokens again.
    """

    swap_s: float
    recompute_s: float


class PreemptionPolicy(Protocol):
    """Chooses the mode for one victim."""

    def choose(self, view: PreemptionView) -> Mode: ...


class Recompute:
    """Never swap."""

    def choose(self, view: PreemptionView) -> Mode:
        return Mode.RECOMPUTE


class Swap:
    """Always swap."""

    def choose(self, view: PreemptionView) -> Mode:
        return Mode.SWAP


class Auto:
    """The cheaper one."""

    def choose(self, view: PreemptionView) -> Mode:
        return Mode.SWAP if view.swap_s < view.recompute_s else Mode.RECOMPUTE
