"""The queue of waiting sequences, in the order that the order policy ranks them.

With an order by service there is a line for each tenant, and the queue is all lines in turn.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from tierkv.engine.request import QUEUED, Sequence
from tierkv.policies.order import OrderPolicy, Rank, ServiceOrder, WaitingView

_MAX_RANKED = 256  # more are not ranked anew each step: they keep the order of their arrival
_ONE_LINE = ""

_Item = tuple[Rank, int, Sequence]


class WaitingQueue:
    """Sequences in a `QUEUED` state, most urgent first.

    Args:
        order: ranks them; once, or before each admission if it uses the cached prefix.
        num_matched: tokens of a sequence that are cached now.

    Attributes:
        service: the order, if it wants to know what is served to whom.
    """

    def __init__(self, order: OrderPolicy, num_matched: Callable[[Sequence], int]) -> None:
        self._order = order
        self.service = order if isinstance(order, ServiceOrder) else None
        self._num_matched = num_matched
        self._lines: dict[str, list[_Item]] = {}

    def __len__(self) -> int:
        return sum(1 for line in self._lines.values() for _ in _queued(line))

    def __bool__(self) -> bool:
        return any(True for line in self._lines.values() for _ in _queued(line))

    def __iter__(self) -> Iterator[Sequence]:
        if self.service is None:
            return (item[2] for item in _queued(self._lines.get(_ONE_LINE, [])))
        return self._in_turn(self.service)

    def _in_turn(self, order: ServiceOrder) -> Iterator[Sequence]:
        """As if whoever comes out were admitted at once."""
        heads = []
        for tenant, line in self._lines.items():
            rest = _queued(line)
            if (first := next(rest, None)) is not None:
                heads.append((order.served(tenant), first, tenant, rest))
        heapify(heads)  # no two items are equal, so nothing after them is compared
        while heads:
            served, item, tenant, rest = heappop(heads)
            yield item[2]
            if (following := next(rest, None)) is not None:
                served += order.cost(tenant, item[2].num_tokens)
                heappush(heads, (served, following, tenant, rest))

    def add(self, seq: Sequence) -> None:
        tenant = _ONE_LINE
        if self.service is not None:
            tenant = seq.request.tenant
            waiting = [t for t, line in self._lines.items() if any(True for _ in _queued(line))]
            if tenant not in waiting:
                self.service.joined(tenant, waiting)
        insort(self._lines.setdefault(tenant, []), self._item(seq, 0), key=_rank)

    def rank_again(self) -> None:
        """Bring the order up to date with the cache, if the policy asks for it."""
        line = self._lines.get(_ONE_LINE, [])
        if self._order.uses_match and len(line) <= _MAX_RANKED:
            ranked = (self._item(seq, self._num_matched(seq)) for seq in self)
            self._lines[_ONE_LINE] = sorted(ranked, key=_rank)

    def drop_departed(self) -> None:
        """Forget sequences that do not wait any more."""
        lines = {tenant: list(_queued(line)) for tenant, line in self._lines.items()}
        self._lines = {tenant: line for tenant, line in lines.items() if line}

    def _item(self, seq: Sequence, num_matched: int) -> _Item:
        request = seq.request
        view = WaitingView(seq.queued_s, seq.seq_id, request.priority, seq.num_tokens, num_matched)
        return self._order.rank(view), seq.seq_id, seq


def _rank(item: _Item) -> tuple[Rank, int]:
    return item[:2]


def _queued(line: list[_Item]) -> Iterator[_Item]:
    return (item for item in line if item[2].state in QUEUED)
