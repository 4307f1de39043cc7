"""The queue of waiting sequences, in the order that the order policy ranks them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from tierkv.engine.request import QUEUED, Sequence
from tierkv.policies.order import OrderPolicy, Rank, WaitingView

_MAX_RANKED = 256  # more are not ranked anew each step: they keep the order of their arrival

_Item = tuple[Rank, int, Sequence]


class WaitingQueue:
    """Sequences in a `QUEUED` state, most urgent first.

    Args:
        order: ranks them; once, or before each admission if it uses the cached prefix.
        num_matched: tokens of a sequence that are cached now.
    """

    def __init__(self, order: OrderPolicy, num_matched: Callable[[Sequence], int]) -> None:
        self._order = order
        self._num_matched = num_matched
        self._items: list[_Item] = []

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def __iter__(self) -> Iterator[Sequence]:
        return (item[2] for item in self._items if item[2].state in QUEUED)

    def add(self, seq: Sequence) -> None:
        insort(self._items, self._item(seq, 0), key=_rank)

    def rank_again(self) -> None:
        """Bring the order up to date with the cache, if the policy asks for it."""
        if self._order.uses_match and len(self._items) <= _MAX_RANKED:
            ranked = (self._item(seq, self._num_matched(seq)) for seq in self)
            self._items = sorted(ranked, key=_rank)

    def drop_departed(self) -> None:
        """Forget sequences that do not wait any more."""
        self._items = [item for item in self._items if item[2].state in QUEUED]

    def _item(self, seq: Sequence, num_matched: int) -> _Item:
        request = seq.request
        view = WaitingView(seq.queued_s, seq.seq_id, request.priority, seq.num_tokens, num_matched)
        return self._order.rank(view), seq.seq_id, seq


def _rank(item: _Item) -> tuple[Rank, int]:
    return item[:2]
