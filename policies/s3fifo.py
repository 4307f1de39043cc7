"""S3-FIFO: three queues; most blocks are used once, so they leave by a small one.

    insert:   into `main` if the ghost queue knows the key, else into `small`
    touch:    uses + 1, at most 3
    propose:  from `small` while it holds more than its share (a tenth), else from `main`
        small:  used `promote` times since it came: it and its ancestors move to `main`
                otherwise it leaves, and the ghost queue remembers its key
        main:   used: uses - 1, and to the end of the queue;  otherwise it leaves
    The ghost queue holds at most as many keys as the tier held blocks.

Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023.
"""

from __future__ import annotations

from tierkv.policies.base import AccessHint, Key, Why
from tierkv.policies.ghosts import Ghosts
from tierkv.policies.leaf_first import Entry, LeafQueues

SMALL, MAIN = 0, 1
MAX_USES = 3


class S3FifoPolicy(LeafQueues):
    """S3-FIFO, leaf first.

    Args:
        small: share of the blocks that the small queue may keep, 0 to 1.
        promote: uses that bring a block from the small queue to the main one, 1 to 3.
    """

    num_segments = 2

    def __init__(self, small: float = 0.1, promote: int = 2) -> None:
        if not 0 <= small <= 1 or promote not in range(1, MAX_USES + 1):
            raise ValueError(f"s3fifo: small={small} must be in 0..1, promote={promote} in 1..3")
        super().__init__()
        self.ghosts = Ghosts()
        self._small, self._promote = small, promote

    def entered(self, entry: Entry, hint: AccessHint) -> None:
        self.place(entry, (self.tick(),), MAIN if self.ghosts.discard(entry.key) else SMALL)

    def used(self, entry: Entry, hint: AccessHint) -> None:
        if not hint.ends_use and entry.uses < MAX_USES:
            entry.uses += 1

    def choose(self, candidate: Key | None) -> int:
        return SMALL if self.sizes[SMALL] > self._small * sum(self.sizes) else MAIN

    def spared(self, entry: Entry) -> bool:
        if entry.segment == SMALL:
            if entry.uses < self._promote:
                return False
            entry.uses = 0
            self.move_path(entry, MAIN, (self.tick(),))
            return True
        if not entry.uses:
            return False
        entry.uses -= 1
        self.place(entry, (self.tick(),))
        return True

    def left(self, entry: Entry, why: Why) -> None:
        if why is Why.EVICTED and entry.segment == SMALL:
            self.ghosts.add(entry.key, self.peak)
