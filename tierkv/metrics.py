"""Counters and gauges of one engine, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tierkv.types import FinishReason


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
        recomputed_tokens: tokens computed anew because a preemption dropped them.
        preemptions: times a running sequence was stopped for room, or for others' turn.
        swaps: of those, by swap.
        loads_chosen, recomputes_chosen: what was decided for hits in a lower tier.
        finished: sequences that ended, by reason.
    """

    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    hit_tokens_cpu: int = 0
    hit_tokens_nvme: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    loads_chosen: int = 0
    recomputes_chosen: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )

    def sequence_finished(self, reason: FinishReason) -> None:
        self.finished[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        """Counters by name; `finished_stop`, `finished_length`, `finished_abort` are flat."""
        counters = {
            name: getattr(self, name)
            for name in (
                "steps",
                "computed_tokens",
                "generated_tokens",
                "queried_tokens",
                "hit_tokens",
                "hit_tokens_cpu",
                "hit_tokens_nvme",
                "recomputed_tokens",
                "preemptions",
                "swaps",
                "loads_chosen",
                "recomputes_chosen",
            )
        }
        counters |= {f"finished_{r.value}": count for r, count in self.finished.items()}
        return counters
