"""What sequences wait for: blocks on their way up into the pool.

Many sequences may wait for one load. When it ends well each is told that one block fewer is
missing; when it fails or is late, each keeps what comes before the block and computes the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from tierkv.cache.evictor import GPU
from tierkv.cache.holder import BlockHolder
from tierkv.cache.lookup import lower_tier
from tierkv.cache.moves import Ended, Moves, Ticket
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefix_tree import Block
from tierkv.cache.tails import Tails
from tierkv.errors import InvariantError
from tierkv.types import MovePriority, TierName


class Loads:
    """Begins loads for sequences and ends their waiting.

    Args:
        moves, pool, tails: of the cache.
        truncate: makes a sequence give up its blocks from an index on.
        timeout_s: after it a load is a miss.

    Attributes:
        num_joined: waits for a load that had begun before.
        num_prefetched: loads begun for later; of them `num_prefetched_late` that somebody had to
            wait for, and `num_prefetched_lost` that did not arrive.
        num_tails: swapped sequences that got their last block back.
    """

    def __init__(
        self,
        moves: Moves,
        pool: PoolBlocks,
        tails: Tails,
        truncate: Callable[[BlockHolder, int], None],
        timeout_s: float,
    ) -> None:
        self._moves = moves
        self._pool = pool
        self._tails = tails
        self._truncate = truncate
        self._timeout_s = timeout_s
        self.num_joined = 0
        self.num_prefetched = 0
        self.num_prefetched_late = 0
        self.num_prefetched_lost = 0
        self.num_tails = 0
        self._expected: dict[int, tuple[float, float]] = {}
        self._timed: list[tuple[float, float]] = []

    def wait_for(self, seq: BlockHolder, block: Block) -> None:
        """Let the sequence, which has pinned the block, wait until it is in the pool; the load
        begins now unless it has already."""
        ticket = self._moves.loads.get(block.key)
        if ticket is None:
            ticket = self._begin(block, MovePriority.DEMAND)
        else:
            self.num_joined += 1
            if ticket.copy.is_prefetched:
                ticket.copy.is_prefetched = False
                self.num_prefetched_late += 1
        ticket.waiters.append(seq)
        seq.num_loading += 1

    def source_of(self, block: Block) -> TierName | None:
        """Where the block is on its way from into the pool; None when it is not."""
        ticket = self._moves.loads.get(block.key)
        return None if ticket is None else ticket.move.source

    def prefetch(self, block: Block) -> int:
        """Begin to load a block that nobody waits for yet; returns the pool blocks taken."""
        self._begin(block, MovePriority.PREFETCH).copy.is_prefetched = True
        self.num_prefetched += 1
        return 1

    def _begin(self, block: Block, priority: MovePriority) -> Ticket:
        source = lower_tier(block)
        if source is None or GPU in block.copies:
            raise InvariantError(f"block {block.key.hex()} cannot be loaded")
        self._pool.make_slot(block.owner)
        deadline = self._moves.now() + self._timeout_s
        return self._moves.begin(block, source, GPU, priority, deadline_s=deadline)

    def end(self, ended: Ended) -> None:
        """A move ended: tell who waited for it."""
        ticket, block = ended.ticket, ended.ticket.block
        waiters, ticket.waiters = ticket.waiters, []
        for seq in waiters:
            seq.num_loading -= 1
            self._note_time(seq, ended)
        if ticket.copy.is_prefetched and not ended.is_ready:
            ticket.copy.is_prefetched = False
            self.num_prefetched_lost += 1
        if ticket.move.destination is GPU and not ended.is_ready:
            for seq in waiters:
                if block in seq.blocks:  # else an earlier failure has cut it off already
                    self._truncate(seq, seq.blocks.index(block))
        elif ended.is_ready and ticket.move.destination is GPU and not block.in_tree:
            self._tails.came_back(block)
            self.num_tails += 1
        if not block.in_tree:
            self._tails.move_ended(block)

    def expect(self, seq: BlockHolder, seconds: float) -> None:
        """The sequence has just begun to wait, and was promised to do so for so long."""
        if seq.num_loading:
            self._expected[seq.seq_id] = seconds, self._moves.now()

    def take_timed(self) -> list[tuple[float, float]]:
        """Expected and actual seconds of each wait that ended well since the last call."""
        timed, self._timed = self._timed, []
        return timed

    def _note_time(self, seq: BlockHolder, ended: Ended) -> None:
        if not ended.is_ready:
            self._expected.pop(seq.seq_id, None)
        elif not seq.num_loading and seq.seq_id in self._expected:
            expected_s, begun_s = self._expected.pop(seq.seq_id)
            self._timed.append((expected_s, self._moves.now() - begun_s))

    def forget(self, seq: BlockHolder, blocks: list[Block | None]) -> None:
        """The sequence gives up these blocks; it does not wait for them any more."""
        self._expected.pop(seq.seq_id, None)
        if not seq.num_loading:
            return
        for block in blocks:
            ticket = self._moves.loads.get(block.key) if block is not None else None
            if ticket is not None and seq in ticket.waiters:
                ticket.waiters.remove(seq)
                seq.num_loading -= 1
