"""Drawn tokens that are still on the device: who reads them there, and how they reach the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tierkv.engine.sampler_filters import ids
from tierkv.types import RowResult


class HostCopy:
    """Numbers on their way from the device to the host.

    Args:
        numbers: any shape, dtype and device; the copy is queued behind what computes them.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._host = numbers.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> Any:
        """A list, of lists for each further dimension, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class UnreadTokens:
    """A step's tokens, not read by the host yet: a `tierkv.protocols.Drawn`.

    Args:
        numbers: int64 `[n]`, the drawn tokens.
        find_places: says where in `numbers` the first token of a sequence is, by its id.
        fill: makes results of the numbers, once they are on the host.
    """

    def __init__(
        self,
        numbers: Tensor,
        find_places: Callable[[], dict[int, int]],
        fill: Callable[[list[int]], list[RowResult]],
    ) -> None:
        self._numbers, self._find_places, self._fill = numbers, find_places, fill
        self._copy = HostCopy(numbers)

    def results(self) -> list[RowResult]:
        """One per row of the plan; waits for the device."""
        return self._fill(self._copy.read())

    def tokens_of(self, seq_ids: list[int]) -> Tensor:
        """The last token of each sequence, int64 `[len(seq_ids)]` on the device."""
        known = self._find_places()
        places = [known[seq_id] for seq_id in seq_ids]
        if places == list(range(len(self._numbers))):
            return self._numbers
        return self._numbers.index_select(0, ids(places, self._numbers))
