"""Sampling flags of the terminal commands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tierkv.config import option
from tierkv.engine.sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True)
class SamplingOptions:
    """The fields of `SamplingParams` that make sense for one answer in a terminal.

    The seed is the engine's option: it seeds all that is sampled here.
    """

    max_tokens: int = option(256, "generated tokens at most")
    min_tokens: int = option(0, "no end before so many tokens")
    temperature: float = option(1.0, "0 always takes the most likely token")
    top_k: int = option(0, "sample among the k most likely tokens; 0 means all")
    top_p: float = option(1.0, "sample among the most likely tokens that reach this probability")
    min_p: float = option(0.0, "drop tokens less likely than this share of the best one")
    repetition_penalty: float = option(1.0, "above 1 makes tokens that were there less likely")
    presence_penalty: float = option(0.0, "subtracted once from generated tokens' logits")
    frequency_penalty: float = option(0.0, "subtracted from them once per occurrence")
    stop: list[str] | None = option(None, "text that ends the output; may be given several times")
    ignore_eos: bool = option(False, "go on after the end-of-sequence token")

    def params(self) -> SamplingParams:
        """As `SamplingParams`.

        Raises:
            RequestError: a value is out of range.
        """
        values = dataclasses.asdict(self)
        return SamplingParams(**{**values, "stop": self.stop or []})
