"""Counters and gauges of one engine, as plain numbers (docs/metrics.md lists them all)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from tierkv.types import FinishReason

_GAUGES = re.compile(
    r"running|waiting|offers_waiting|moves_in_flight\w*|erasures_open|nvme_quarantined_\w+"
    r"|[a-z]+_blocks(_free|_cached|_used)?|[a-z]+_(capacity|used|pinned)_bytes"
)


def kind_of(name: str) -> Literal["counter", "gauge"]:
    """Whether a metric only grows, or says how things are now."""
    return "gauge" if _GAUGES.fullmatch(name) else "counter"


@dataclass(slots=True)
class Metrics:
    """Counters since the engine started.

    Attributes:
        steps: forward passes committed.
        computed_tokens: tokens whose KV was computed, prompts and decode together.
        generated_tokens: tokens sampled.
        queried_tokens: prompt tokens of requests at their first admission.
        hit_tokens: of those, tokens reused from any tier.
        hit_tokens_cpu, hit_tokens_nvme: of those, tokens that had to be loaded from that tier.
        pending_tokens: tokens that a waiting request found another one computing.
        recomputed_tokens: tokens computed anew because a preemption dropped them.
        preemptions: times a running sequence was stopped for room, or for others' turn.
        swaps: of those, by swap.
        loads_chosen, recomputes_chosen: what was decided for hits in a lower tier.
        load_predicted_s, load_actual_s: seconds that loads were expected to take and took
            (`note_load`).
        recompute_predicted_s, recompute_actual_s: likewise of prefixes that were computed although
            a lower tier had them (`note_recompute`).
        finished: sequences that ended, by reason.
    """

    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    hit_tokens_cpu: int = 0
    hit_tokens_nvme: int = 0
    pending_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    loads_chosen: int = 0
    recomputes_chosen: int = 0
    load_predicted_s: float = 0.0
    load_actual_s: float = 0.0
    recompute_predicted_s: float = 0.0
    recompute_actual_s: float = 0.0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )

    def sequence_finished(self, reason: FinishReason) -> None:
        self.finished[reason] += 1

    def note_load(self, predicted_s: float, actual_s: float) -> None:
        """A load ended well: both sums are over the same loads."""
        self.load_predicted_s += predicted_s
        self.load_actual_s += actual_s

    def note_recompute(self, predicted_s: float, actual_s: float) -> None:
        """What could have been loaded is computed: both sums are over the same prefixes."""
        self.recompute_predicted_s += predicted_s
        self.recompute_actual_s += actual_s

    def as_dict(self) -> dict[str, Any]:
        """Counters by name; `finished_stop`, `finished_length`, `finished_abort` are flat."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "finished"]
        counters: dict[str, Any] = {name: getattr(self, name) for name in names}
        counters["miss_tokens"] = self.queried_tokens - self.hit_tokens
        counters |= {f"finished_{r.value}": count for r, count in self.finished.items()}
        return counters
