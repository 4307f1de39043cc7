"""The cache as the scheduler sees it: look up, acquire, grow, seal, release.

A sequence holds its blocks by pins. Blocks it computes are private until they are full and their
tokens are final; `seal` then puts them into the prefix tree, where other sequences find them.
`release` takes the pins away: private blocks are freed at once, blocks of the tree stay as cache
until the eviction policy gives them up.

With lower tiers, `acquire` begins the loads of what is not in the pool, `seal` offers what was
computed to the tier below, `swap_out` sends a sequence's last blocks down, and `poll` ends moves.
"""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.cache.claims import Claims
from tierkv.cache.copies import Copies
from tierkv.cache.evictor import CPU, GPU, NVME, Evictor
from tierkv.cache.hashing import extend_keys
from tierkv.cache.hints import BlockCosts, HintMaker, Hints
from tierkv.cache.holder import BlockHolder, is_stored
from tierkv.cache.keeps import Keeps
from tierkv.cache.loads import Loads
from tierkv.cache.lookup import Lookup, Match, Walker, is_in_pool
from tierkv.cache.lower_tiers import LowerTiers, MoveLimits, TierSpec
from tierkv.cache.moves import Moves
from tierkv.cache.pool_blocks import PoolBlocks
from tierkv.cache.prefetcher import PrefetchBudget, Prefetcher
from tierkv.cache.prefix_tree import Block, PrefixTree
from tierkv.cache.residency import CopyState, Residency
from tierkv.cache.sealer import Sealer
from tierkv.cache.shares import Share
from tierkv.cache.swapper import Swapper
from tierkv.cache.tails import Tails
from tierkv.errors import InvariantError
from tierkv.policies.admission import When
from tierkv.policies.base import AccessHint, EvictionPolicy
from tierkv.protocols import Clock, CostModel, Mover
from tierkv.types import Move, TierName

__all__ = ["CPU", "GPU", "NVME", "Lookup", "Match", "TieredCache"]


class TieredCache:
    """Blocks of all sequences and the prefix tree over them.

    Args:
        num_gpu_blocks: slots of the GPU pool.
        block_size: tokens per block.
        policy: eviction policy of the GPU tier.
        clock: supplies `AccessHint.now`, and deadlines.
        fingerprint: model fingerprint, part of every key.
        enable_prefix_caching: without it nothing is sealed and every lookup misses.
        window: tokens that attention looks back when *every* layer has a sliding window; blocks
            behind it are released and a hit needs only the blocks within it.
        tiers: the lower tiers from hot to cold; they need prefix caching.
        mover: copies blocks between tiers; needed with `tiers`.
        slot_bytes: bytes of a block, for budgets.
        limits: how much may move.
        cost: for eviction policies that weigh what a block costs.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        block_size: int,
        policy: EvictionPolicy,
        clock: Clock,
        *,
        fingerprint: bytes = b"",
        enable_prefix_caching: bool = True,
        window: int | None = None,
        tiers: Sequence[TierSpec] = (),
        mover: Mover | None = None,
        slot_bytes: int = 1,
        limits: MoveLimits | None = None,
        cost: CostModel | None = None,
    ) -> None:
        self.block_size = block_size
        self.window = window
        self.residency = Residency(
            {GPU: num_gpu_blocks, **{spec.name: spec.capacity for spec in tiers}}
        )
        self.tree = PrefixTree(fingerprint, block_size)
        policies = {GPU: policy, **{spec.name: spec.eviction for spec in tiers}}
        costs, is_chained = BlockCosts(cost) if cost is not None else None, window is None
        self.evictors: dict[TierName, Evictor] = {}
        for name, p in policies.items():
            self.evictors[name] = Evictor(
                name, p, self.tree, self.residency, self.evictors, is_chained, costs
            )
        self.shares: dict[str, Share] = {}
        self.salts: dict[str, Share] = {}
        self.tails = Tails(self.residency)
        self.pool = PoolBlocks(self.residency, self.evictors[GPU], self.tails, self._leaving)
        self.moves: Moves | None = None
        self.lower: LowerTiers | None = None
        self.swapper: Swapper | None = None
        self.prefetcher: Prefetcher | None = None
        self._clock = clock
        self._hints = Hints(clock, block_size)
        self.hint_of = self._hints.of_block  # for accesses that no request is behind
        self.is_caching = enable_prefix_caching
        self._walker = Walker(self.tree, block_size, window)
        self.claims = Claims()
        self._sealer = Sealer(
            self.tree,
            self.residency,
            self.evictors[GPU],
            self.pool,
            self._rescue,
            self._published,
        )
        self.copies = Copies(self.pool)
        if mover is not None and tiers:
            self._add_tiers(tiers, mover, slot_bytes, limits or MoveLimits())
        self.keeps = Keeps(self.tree, self.evictors, self.lower, clock, self.hint_of)

    def _add_tiers(
        self, tiers: Sequence[TierSpec], mover: Mover, slot_bytes: int, limits: MoveLimits
    ) -> None:
        self.moves = Moves(
            self.residency,
            self.evictors,
            mover,
            self._clock,
            self.hint_of,
            slot_bytes=slot_bytes,
            is_chained=self.window is None,
        )
        self._walker.stalled = self.moves.stalled
        self.lower = LowerTiers(
            tiers, self.residency, self.evictors, self.moves, limits, self.hint_of, self.block_size
        )
        self.loads = Loads(self.moves, self.pool, self.tails, self._truncate, limits.load_timeout_s)
        self.prefetcher = Prefetcher(self.pool, self.loads, self.lower, self._walker, self.claims)
        self.swapper = Swapper(
            self.residency, self.moves, self.lower, self.loads, self.pool, self.tails
        )

    # ------------------------------------------------------------------ capacity

    @property
    def num_blocks(self) -> int:
        return self.residency.tiers[GPU].capacity

    @property
    def num_empty(self) -> int:
        return self.residency.tiers[GPU].num_empty

    @property
    def num_available(self) -> int:
        """Blocks that could be allocated now: empty, or cached and evictable."""
        return self.pool.num_available

    @property
    def num_leaving(self) -> int:
        """Pool blocks that will be available when moves in flight have ended."""
        return 0 if self.moves is None else self.moves.num_leaving

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def blocks_to_hold(self, num_tokens: int, chunk: int) -> int:
        """The most blocks a sequence holds at once on its way to `num_tokens`, computed in steps
        of at most `chunk` tokens; with a window that is less than all."""
        if self.window is None:
            return self.blocks_for(num_tokens)
        return self.blocks_for(min(num_tokens, self.window + chunk + 2 * self.block_size))

    def blocks_to_grow(self, seq: BlockHolder, num_tokens: int) -> int:
        """Blocks that `grow(seq, num_tokens)` would allocate."""
        need = max(0, self.blocks_for(num_tokens) - len(seq.block_table))
        return need + 1 if self._must_copy_tail(seq) else need

    # ------------------------------------------------------------------ look up and acquire

    def lookup(self, seq: BlockHolder, *, use_cache: bool = True, use_lower: bool = True) -> Match:
        """What is cached of `seq.token_ids`; changes nothing but the keys memoised on `seq`.

        At least the last token is left to compute, because its logits are wanted.
        """
        if not self.is_caching or not use_cache:
            return Match()
        self._extend_keys(seq)
        match = self._walker.walk(seq, use_lower=use_lower and self.lower is not None)
        if match.num_loads and self.window is None:
            match = self._cut_at_computing(seq, match)
        depth = len(match.blocks)
        if depth < len(seq.block_keys) and self.claims.is_claimed(seq, seq.block_keys[depth]):
            match.next = Lookup.PENDING
        elif not match.num_loads:
            self._walker.add_partial(seq, match)
        return match

    def promote(self, seq: BlockHolder, budget: PrefetchBudget) -> None:
        """Begin to bring up what a waiting sequence will need."""
        if self.prefetcher is not None:
            self._extend_keys(seq)
            self.prefetcher.promote(seq, budget)

    def _cut_at_computing(self, seq: BlockHolder, match: Match) -> Match:
        """What another sequence is computing anew is waited for, not loaded."""
        first = len(match.blocks) - match.num_loads
        for index in range(first, len(match.blocks)):
            if self.claims.is_claimed(seq, seq.block_keys[index]):
                return match.cut(index, self.block_size)
        return match

    def acquire(self, seq: BlockHolder, match: Match, num_head: int = 0) -> None:
        """Pin what matched and make it the beginning of the sequence's block table.

        Blocks that are not in the pool begin to be loaded: `seq.num_loading` counts them, and
        `skip_loaded` moves `num_computed` past them once they are there. The caller has checked
        `blocks_to_acquire` against `num_available`.

        Args:
            seq: holds nothing yet.
            match: what to acquire.
            num_head: how many of the blocks that are not in the pool the sequence computes itself
                while the rest is loaded.
        """
        hint_of = self._hints.of_use(seq)
        first_load = len(match.blocks) - match.num_loads
        loaded = match.blocks
        if num_head:
            loaded = [*match.blocks[:first_load], *match.blocks[first_load + num_head :]]
        held = [block for block in reversed(loaded) if block is not None]
        self.pool.pin_all(held)
        self._touch(held, hint_of)
        seq.blocks, seq.block_table = [], []
        for index, block in enumerate(match.blocks):
            if first_load <= index < first_load + num_head:
                self._append(seq)
            else:
                self._take(seq, block)
        seq.num_sealed = first_load if match.num_loads else len(match.blocks)
        seq.num_released = next((i for i, b in enumerate(match.blocks) if b is not None), 0)
        seq.num_computed = match.num_tokens
        seq.table_version += 1
        if self.keeps.is_active:
            self.keeps.used(seq, match.blocks)
        if match.num_loads:
            self._begin_waiting(seq, match, first_load + num_head)
        is_resumed = self.swapper is not None and self.swapper.bring_back(seq, match)
        if match.partial is not None and not is_resumed:
            self._take_partial(seq, match.partial, hint_of)
        if self.is_caching and is_stored(seq):
            self._extend_keys(seq)
            self.claims.claim(seq, self.block_size)

    def _begin_waiting(self, seq: BlockHolder, match: Match, load_from: int) -> None:
        seq.load_from = load_from
        seq.load_tokens = len(match.blocks) * self.block_size
        if self.window is not None:  # what is in the pool is no prefix: all of it, or nothing
            seq.load_from = seq.num_computed = 0

    def _take(self, seq: BlockHolder, block: Block | None) -> None:
        """Append a block, already pinned, to the table; load it if it is not in the pool."""
        seq.blocks.append(block)
        copy = block.copies.get(GPU) if block is not None else None
        if block is not None and (copy is None or copy.state is not CopyState.READY):
            if is_in_pool(block):
                self._rescue(block)
            else:
                self.loads.wait_for(seq, block)
            copy = block.copies[GPU]
        seq.block_table.append(copy.slot if copy is not None else 0)

    def _take_partial(
        self, seq: BlockHolder, partial: tuple[Block, int], hint_of: HintMaker
    ) -> None:
        source, _ = partial
        self._rescue(source)
        self._touch([source], hint_of)
        self._append_copy_of(seq, *partial)

    def blocks_to_acquire(self, match: Match, num_tokens: int, chunk: int) -> int:
        """How much `num_available` falls at most when the match is acquired and then grown to
        `num_tokens` in steps of `chunk`."""
        copies = [b.copies[GPU] for b in match.blocks if b is not None and GPU in b.copies]
        rescued = sum(1 for copy in copies if copy.is_evictable)
        grown = self.blocks_for(num_tokens) - (len(match.blocks) - match.num_loads)
        source = 1 if match.partial is not None and match.partial[0].pins == 0 else 0
        return min(rescued + grown, self.blocks_to_hold(num_tokens, chunk)) + source

    def _extend_keys(self, seq: BlockHolder) -> None:
        if len(seq.block_keys) < len(seq.token_ids) // self.block_size:
            root = self.tree.root_key(seq.cache_salt)
            extend_keys(seq.block_keys, root, seq.token_ids, self.block_size)

    def _touch(self, chain: Sequence[Block], hint_of: HintMaker) -> None:
        """Blocks are used: tell the policies of the tiers that hold them, and offer them down."""
        for evictor in self.evictors.values():
            evictor.touch_chain(chain, hint_of)
        if self.lower is not None:
            below = self.lower.below_pool
            for block in chain:
                if below not in block.copies and is_in_pool(block):
                    self.lower.offer(block, GPU, When.USED, hint_of(block.depth))

    # ------------------------------------------------------------------ grow

    def grow(self, seq: BlockHolder, num_tokens: int) -> None:
        """Give the sequence blocks for its first `num_tokens` tokens, its tail writable.

        The caller has checked `blocks_to_grow` against `num_available`.
        """
        if self._must_copy_tail(seq):
            tail = seq.blocks.pop()
            seq.block_table.pop()
            if tail is None:
                raise InvariantError(f"sequence {seq.seq_id}: its tail was released")
            self._append_copy_of(seq, tail, seq.num_computed % self.block_size)
            self.pool.unpin(tail, None)
            seq.table_version += 1
        while len(seq.block_table) * self.block_size < num_tokens:
            self._append(seq)

    def _must_copy_tail(self, seq: BlockHolder) -> bool:
        """Others hold the block too, or somebody who shared it has filled and published it."""
        index, used = divmod(seq.num_computed, self.block_size)
        tail = seq.blocks[index] if used and index < len(seq.blocks) else None
        if tail is None:
            return False
        return tail.in_tree or (tail.pins > 1 and tail.pins - self.copies.num_from(tail) > 1)

    def _append(self, seq: BlockHolder) -> Block:
        block = self.pool.new_block(len(seq.blocks), seq.owner)
        seq.block_table.append(block.copies[GPU].slot)
        seq.blocks.append(block)
        return block

    def _append_copy_of(self, seq: BlockHolder, source: Block, num_tokens: int) -> None:
        self.pool.pin(source)
        block = self._append(seq)
        self.copies.add(source, block, num_tokens)

    # ------------------------------------------------------------------ seal and release

    def seal(self, seq: BlockHolder, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is computed and the tokens are final."""
        first, last = seq.num_sealed, num_tokens // self.block_size
        if first < last and self.is_caching and is_stored(seq):
            self._extend_keys(seq)
            hint_of = self._hints.of_use(seq)
            for index in range(first, last):
                own = seq.blocks[index]
                if not self._sealer.try_seal(seq, index, hint_of(index)):
                    break  # a later call tries again
                if self.keeps.is_active and (block := seq.blocks[index]) is not None:
                    self.keeps.sealed(seq, block, is_new=block is own)
                self.claims.drop(seq, seq.block_keys[index])
                seq.num_sealed = index + 1
        if self.window is not None:
            self._release_behind(seq, num_tokens)

    def _published(self, block: Block, hint: AccessHint) -> None:
        if self.lower is not None:
            self.lower.offer(block, GPU, When.READY, hint)

    def _rescue(self, block: Block) -> None:
        if self.moves is not None and block.copies[GPU].state is CopyState.DRAINING:
            self.moves.rescue(block)

    def fork(self, parent: BlockHolder, child: BlockHolder, num_tokens: int) -> None:
        """Let `child` hold the blocks of `parent`'s first `num_tokens` tokens.

        Whoever writes into a shared tail first copies it.
        """
        count = self.blocks_for(num_tokens)
        child.blocks = parent.blocks[:count]
        self.pool.pin_all(block for block in child.blocks if block is not None)
        child.block_table = parent.block_table[:count]
        child.block_keys = parent.block_keys[: num_tokens // self.block_size]
        child.num_computed = num_tokens
        child.num_sealed = min(parent.num_sealed, num_tokens // self.block_size)
        child.num_released = parent.num_released

    def release(self, seq: BlockHolder) -> None:
        """Take the sequence's pins away, tail first, and empty its block table."""
        for key in seq.block_keys[seq.num_sealed :]:
            self.claims.drop(seq, key)
        if self.keeps.is_active:
            self.keeps.released(seq)
        self._drop_from(seq, 0)
        if seq.owner is not None:
            self.pool.trim(seq.owner)
        seq.num_computed = seq.num_sealed = seq.num_released = 0
        if seq.tail is not None:
            tail, seq.tail = seq.tail, None
            self.tails.give_up(tail)

    def _drop_from(self, seq: BlockHolder, index: int) -> None:
        """Take the pins of the blocks from `index` on away, tail first."""
        dropped = seq.blocks[index:]
        if self.moves is not None:
            self.loads.forget(seq, dropped)
        hint_of = self._hints.of_use(seq, ends=True)
        self.pool.unpin_chain([b for b in reversed(dropped) if b is not None], hint_of)
        del seq.blocks[index:], seq.block_table[index:]
        seq.load_from = seq.load_tokens = 0
        seq.table_version += 1

    def _truncate(self, seq: BlockHolder, index: int) -> None:
        """A load failed: keep what comes before block `index`, as far as it is of use."""
        if self.window is not None:
            self._drop_from(seq, 0)
            seq.num_computed = seq.num_sealed = seq.num_released = 0
            return
        load_from = seq.load_from
        self._drop_from(seq, index)
        if index > load_from:
            seq.load_from, seq.load_tokens = load_from, index * self.block_size

    def _release_behind(self, seq: BlockHolder, num_tokens: int) -> None:
        """Drop the pins of blocks that no later query can look at."""
        first = min(self._walker.first_needed(num_tokens), len(seq.blocks))
        if first <= seq.num_released:
            return
        hint_of = self._hints.of_use(seq, ends=True)
        for index in range(seq.num_released, first):
            block = seq.blocks[index]
            if block is not None:
                seq.blocks[index] = None
                seq.block_table[index] = 0
                self.pool.unpin(block, hint_of(index))
        seq.num_released = first
        seq.table_version += 1

    # ------------------------------------------------------------------ lower tiers

    def poll(self) -> None:
        """End what has ended in the background and tell the sequences that waited."""
        if self.keeps.is_active:
            self.keeps.poll()
        if self.moves is None or self.lower is None:
            return
        for ended in self.moves.poll():
            self.loads.end(ended)
            block, tier = ended.ticket.block, ended.ticket.move.destination
            if ended.is_ready and block.in_tree and tier in block.copies:
                self.lower.offer(block, tier, When.READY, self.hint_of(block))

    def skip_loaded(self, seq: BlockHolder) -> bool:
        """Whether the sequence can compute on; moves it past what was loaded for it."""
        if not seq.load_tokens:
            return True
        if seq.num_computed < seq.load_from * self.block_size:
            return True  # its head is still to be computed
        if seq.num_loading:
            return False
        seq.num_computed = seq.load_tokens
        seq.load_from = seq.load_tokens = 0
        return True

    def swap_out(self, seq: BlockHolder) -> None:
        """Release the sequence; what the lower tiers lack of it goes down first."""
        if self.swapper is None:
            raise InvariantError("there is no tier to swap to")
        tokens = seq.num_computed
        tail = self.swapper.send_down(seq)
        self.release(seq)
        if tail is not None:
            seq.tail, seq.tail_tokens = tail, tokens

    def write_back(self) -> None:
        """Begin to write down what earlier steps offered, before room is made for anything new:
        a block that is on its way cannot be evicted from the pool."""
        if self.lower is not None:
            self.lower.pump()

    def take_moves(self) -> list[Move]:
        """Moves that were decided, to begin with the next step."""
        return [] if self.moves is None else self.moves.take_begun()

    def begin(self, moves: list[Move]) -> None:
        """Start moves; does not wait."""
        if self.moves is not None:
            self.moves.start(moves)

    @property
    def has_background_work(self) -> bool:
        """Moves or erasures are in flight, or blocks are offered that will begin to move."""
        if self.moves is None or self.lower is None:
            return False
        return self.moves.has_work or self.lower.num_queued > 0

    @property
    def has_moves(self) -> bool:
        return self.moves is not None and bool(self.moves.tickets)

    def wait(self, timeout_s: float) -> None:
        """Return when a move may have ended, or after `timeout_s`."""
        if self.moves is not None:
            self.moves.wait(timeout_s)

    def _leaving(self, blocks: list[Block]) -> None:
        if self.lower is not None:
            self.lower.leaving_pool(blocks)
