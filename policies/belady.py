"""MIN: the block whose next use is farthest away leaves first; the deepest among equals.

    insert, touch:  rank = (-next use, -depth): ask the future when the block is used next
    propose:        by rising rank

Belady, "A Study of Replacement Algorithms for a Virtual-Storage Computer", IBM Systems Journal
1966. Whoever uses a block uses its ancestors, so none of them is farther away than it is: the
victims are leaves anyway, and the prefixes closed. No other policy that takes in every block of a
request has more hits. Simulators only: it must be told what comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from tierkv.policies.base import AccessHint, Key
from tierkv.policies.leaf_first import Entry, LeafQueues


class Future:
    """When each block is used next, from the list of all requests.

    Args:
        requests: the keys that each request uses, in the order the requests come.
    """

    def __init__(self, requests: Iterable[Iterable[Key]]) -> None:
        self._now = -1
        self._uses: dict[Key, list[int]] = {}
        for number, keys in enumerate(requests):
            for key in keys:
                self._uses.setdefault(key, []).append(number)
        for uses in self._uses.values():
            uses.reverse()

    def advance(self) -> None:
        """The next request begins; the first call begins the first one."""
        self._now += 1

    def next_use(self, key: Key) -> float:
        """The number of the first request after the present one that uses the block, or inf."""
        uses = self._uses.get(key, [])
        while uses and uses[-1] <= self._now:
            uses.pop()
        return uses[-1] if uses else inf


class BeladyPolicy(LeafQueues):
    """The offline optimum.

    Args:
        next_use: when a block is used next, in any unit that grows, inf for never. Asked when the
            block appears and at each use.

    Raises:
        ValueError: without `next_use`.
    """

    def __init__(self, next_use: Callable[[Key], float] | None = None) -> None:
        if next_use is None:
            raise ValueError(
                "belady needs the future: `tierkv simulate` has it as the optimum, beside any "
                "policy; in code, make it with next_use=Future(requests).next_use"
            )
        super().__init__()
        self._next_use = next_use

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        self.used(entry, hint)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        self.place(entry, (-self._next_use(entry.key), -hint.depth, self.tick()))
