"""When blocks of a kind are used again: hazards by age, learned while serving, and what to keep.

    band b      ages in [2^((b-1)/3-4), 2^(b/3-4)) seconds, a third of an octave; the first from 0
    hazard      h[b] = (reused[b] + prior * h_all[b]) / (entered[b] + prior):  of the blocks that
                reached the band unused, the share that was used in it; both counts smoothed over
                the neighbouring bands; h_all is that of all kinds, prior a number of blocks
    worth[b]    sup over m >= b of  sum_{j=b..m} S_j h_j  /  sum_{j=b..m} S_j (1 - h_j / 2) w_j
                S_b = 1, S_{j+1} = S_j (1 - h_j), w_j the width of the band

`worth` is the Gittins index of a block that is kept until its next use and no longer than till the
end of band m: hits per second of room, at the best moment to give up. To give up the block of least
worth is optimal for a room that is kept full on average, if next uses of blocks are independent
given their kind (Gittins 1979, "Bandit Processes and Dynamic Allocation Indices"). LHD (Beckmann,
Chen and Cidon, NSDI 2018) ranks by the same ratio, to the moment when its own evictions end the
life; here nothing depends on what was evicted, because blocks that are gone are still watched.

All sups of a kind are the slopes of one upper convex hull, found in one pass from the last band.
"""

from __future__ import annotations

from bisect import bisect_right
from math import frexp, pow

NUM_BANDS = 96
_PER_OCTAVE = 3
_FIRST_S = 2.0**-4  # where the first band ends
_STEPS = [2.0 ** (step / _PER_OCTAVE - 1) for step in range(1, _PER_OCTAVE)]


def band_of(age_s: float) -> int:
    """The band that an age is in."""
    if age_s < _FIRST_S:
        return 0
    mantissa, exponent = frexp(age_s / _FIRST_S)  # the mantissa is in 1/2..1
    return min(_PER_OCTAVE * (exponent - 1) + 1 + bisect_right(_STEPS, mantissa), NUM_BANDS - 1)


def end_of(band: int) -> float:
    """The age at which the band ends, seconds."""
    return _FIRST_S * pow(2.0, band / _PER_OCTAVE)


WIDTHS = [end_of(0), *(end_of(band) - end_of(band - 1) for band in range(1, NUM_BANDS))]


class ReuseCurves:
    """Counts and worths, by kind and band.

    Args:
        num_kinds: kinds of blocks.

    Attributes:
        entered, reused: blocks that reached a band unused, and those that were used in it; by
            kind, then band.
        worth: as above, as of the last `refresh`; nothing is worth anything before.
    """

    def __init__(self, num_kinds: int) -> None:
        self.entered = [[0.0] * NUM_BANDS for _ in range(num_kinds)]
        self.reused = [[0.0] * NUM_BANDS for _ in range(num_kinds)]
        self.worth = [[0.0] * NUM_BANDS for _ in range(num_kinds)]

    def refresh(self, prior: float, keep: float) -> None:
        """Compute the worths, then let counts fade.

        Args:
            prior: blocks of all kinds that stand in for what is not known of one, above 0.
            keep: the share of the counts that stays.
        """
        entered = [sum(column) for column in zip(*self.entered, strict=True)]
        reused = [sum(column) for column in zip(*self.reused, strict=True)]
        overall = [min(1.0, r / e) if e > 0 else 0.0 for r, e in zip(reused, entered, strict=True)]
        for kind, reached in enumerate(self.entered):
            if reached[0] > 0:
                self.worth[kind] = hull(self._hazards(kind, overall, prior))
                self.entered[kind] = [keep * count for count in reached]
                self.reused[kind] = [keep * count for count in self.reused[kind]]

    def _hazards(self, kind: int, overall: list[float], prior: float) -> list[float]:
        counts = zip(smooth(self.reused[kind]), smooth(self.entered[kind]), overall, strict=True)
        return [min(1.0, max(0.0, (r + prior * h) / (max(0.0, e) + prior))) for r, e, h in counts]


def smooth(counts: list[float]) -> list[float]:
    """Each with half of its neighbours': what is between bands belongs to both."""
    padded = [counts[0], *counts, counts[-1]]
    return [(a + 2 * b + c) / 4 for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)]


def hull(hazards: list[float]) -> list[float]:
    """The worth of each band.

    From the last band on, a stack of stretches `(hits, room)` whose slopes fall: a new band joins
    the stretches after it for as long as they are steeper than what it has become.
    """
    worths = [0.0] * len(hazards)
    stack: list[tuple[float, float, float]] = []  # hits, room, survivors; each from survival 1
    for band in range(len(hazards) - 1, -1, -1):
        hazard = hazards[band]
        hits, room, alive = hazard, (1 - hazard / 2) * WIDTHS[band], 1 - hazard
        while stack and stack[-1][0] * room > hits * stack[-1][1]:
            more_hits, more_room, more_alive = stack.pop()
            hits += alive * more_hits
            room += alive * more_room
            alive *= more_alive
        stack.append((hits, room, alive))
        worths[band] = hits / room
    return worths
