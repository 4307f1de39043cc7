"""Few cases in which every two values of any two axes meet."""

from __future__ import annotations

import itertools
import random
from typing import Any


def pairwise(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Cases that together hold every pair of values of every two axes (greedy, deterministic)."""
    names, rng = list(axes), random.Random(0)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    cases = []
    while missing:
        draws = [[rng.randrange(len(values)) for values in axes.values()] for _ in range(60)]
        covered = [
            {(a, d[a], b, d[b]) for a, b in itertools.combinations(range(len(names)), 2)}
            for d in draws
        ]
        best = max(range(len(draws)), key=lambda i: len(covered[i] & missing))
        if covered[best] & missing:
            missing -= covered[best]
            cases.append({n: axes[n][i] for n, i in zip(names, draws[best], strict=True)})
    return cases
