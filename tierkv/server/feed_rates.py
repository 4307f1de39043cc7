"""What snapshots say about time: how fast tokens and bytes go, and what was found in which tier."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

SPEED_S = 2.0
"""Speeds are means over so long at least: one snapshot may hold many steps, or half a step."""

HITS_S = 10.0
"""Prompts come seldom: what was found for them is a mean over so long."""

SAMPLE = ("t", "generated", "prompt", "hit_gpu", "hit_cpu", "hit_nvme", "running", "queued")
"""A point of the charts: tokens per second, shares of prompt tokens (None without prompts),
sequences."""

MOST_SAMPLES = 480

Snapshot = dict[str, Any]


@dataclass(slots=True)
class _Point:
    t: float
    counters: dict[str, float]
    moved: dict[tuple[str, str], int]


class Rates:
    """Turns counters into speeds and shares.

    Attributes:
        history: the last samples, oldest first.
    """

    def __init__(self) -> None:
        self.history: deque[list[float | None]] = deque(maxlen=MOST_SAMPLES)
        self._points: deque[_Point] = deque()

    def restart(self) -> None:
        """Nobody looked for a while: a mean over that time would say nothing of now."""
        self._points.clear()

    def add(self, snapshot: Snapshot) -> dict[str, Any]:
        """Speeds and shares at a snapshot; remembers its sample."""
        moved = {(link[0], link[1]): link[3] for link in snapshot["links"]}
        point = _Point(snapshot["t"], snapshot["counters"], moved)
        speeds = self._speeds(point)
        hits = self._hits(point)
        self._points.append(point)
        while self._points[0].t < point.t - HITS_S and len(self._points) > 2:
            self._points.popleft()
        queued = snapshot["waiting"] + snapshot["swapped"] + snapshot["loading"]
        sample = [speeds["generated"], speeds["prompt"], *hits, snapshot["running"], queued]
        self.history.append([round(point.t, 3), *map(_rounded, sample)])
        return {"speeds": speeds, "sample": self.history[-1]}

    def _base(self, point: _Point, seconds: float) -> _Point | None:
        """The latest point that is at least so old, or the oldest there is."""
        old = [p for p in self._points if p.t <= point.t - seconds]
        if old:
            return old[-1]
        return self._points[0] if self._points and self._points[0].t < point.t else None

    def _speeds(self, point: _Point) -> dict[str, Any]:
        base = self._base(point, SPEED_S)
        if base is None:
            return {"generated": None, "prompt": None, "links": {}}
        seconds = point.t - base.t
        generated = point.counters["generated_tokens"] - base.counters["generated_tokens"]
        computed = point.counters["computed_tokens"] - base.counters["computed_tokens"]
        return {
            "generated": generated / seconds,
            "prompt": max(0.0, computed - generated) / seconds,
            "links": {
                link: (num_bytes - base.moved.get(link, 0)) / seconds
                for link, num_bytes in point.moved.items()
            },
        }

    def _hits(self, point: _Point) -> list[float | None]:
        """Of the prompt tokens of late: the shares found in the pool, the CPU tier, on NVMe."""
        base = self._base(point, HITS_S)
        if base is None:
            return [None, None, None]
        new = {name: point.counters[name] - base.counters[name] for name in _HIT_NAMES}
        queried = new["queried_tokens"]
        if queried <= 0:
            return [None, None, None]
        cpu, nvme = new["hit_tokens_cpu"], new["hit_tokens_nvme"]
        gpu = new["hit_tokens"] - cpu - nvme
        return [min(1.0, max(0.0, found / queried)) for found in (gpu, cpu, nvme)]


_HIT_NAMES = ("queried_tokens", "hit_tokens", "hit_tokens_cpu", "hit_tokens_nvme")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
