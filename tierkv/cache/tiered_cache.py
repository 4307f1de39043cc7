"""The cache as the scheduler sees it: look up, acquire, grow, seal, release.

A sequence holds its blocks by pins. Blocks it computes are private until they are full and their
tokens are final; `seal` then puts them into the prefix tree, where other sequences find them.
`release` takes the pins away: private blocks are freed at once, blocks of the tree stay as cache
until the eviction policy gives them up.

Today there is one tier, the GPU pool. Which slot holds what is `Residency`'s to say; lower tiers
join there, in `lookup` (a hit further down) and in `poll`/`begin` (moves).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tierkv.cache.hashing import extend_keys, pack_tokens, private_key
from tierkv.cache.holder import BlockHolder
from tierkv.cache.prefix_tree import Block, PrefixTree
from tierkv.cache.residency import Residency
from tierkv.errors import InvariantError
from tierkv.policies.base import AccessHint, EvictionPolicy, Why
from tierkv.protocols import Clock
from tierkv.types import BlockCopy, BlockKey, TierName

GPU = TierName.GPU


class Lookup(enum.Enum):
    """What a lookup answers about the first block that it does not find."""

    MISS = "miss"  # compute it
    PENDING = "pending"  # another running sequence is computing it: wait


@dataclass(slots=True)
class Match:
    """What of a sequence's tokens is cached.

    Attributes:
        blocks: the leading full blocks; None where a window makes the block unnecessary.
        num_tokens: tokens whose KV can be reused, partial block included.
        partial: a block whose first tokens match, and how many; it is copied and continued.
        next: what is known of the first missing block.
    """

    blocks: list[Block | None] = field(default_factory=list)
    num_tokens: int = 0
    partial: tuple[Block, int] | None = None
    next: Lookup = Lookup.MISS


@dataclass(slots=True)
class CopyBatch:
    """Copy-on-write work for one plan; its sources stay pinned until `finish_copies`."""

    copies: list[BlockCopy] = field(default_factory=list)
    sources: list[Block] = field(default_factory=list)


class _View:
    """`TreeView` over the prefix tree."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree

    def parent(self, key: object) -> BlockKey | None:
        block = self._tree.get(key) if isinstance(key, bytes) else None
        parent = block.parent if block is not None else None
        return parent.key if parent is not None and parent.depth >= 0 else None

    def children(self, key: object) -> Iterator[BlockKey]:
        block = self._tree.get(key) if isinstance(key, bytes) else None
        return iter([c.key for c in block.children.values()] if block is not None else [])


class TieredCache:
    """Blocks of all sequences and the prefix tree over them.

    Args:
        num_gpu_blocks: slots of the GPU pool.
        block_size: tokens per block.
        policy: eviction policy of the GPU tier.
        clock: supplies `AccessHint.now`.
        fingerprint: model fingerprint, part of every key.
        enable_prefix_caching: without it nothing is sealed and every lookup misses.
        window: tokens that attention looks back when *every* layer has a sliding window; blocks
            behind it are released and a hit needs only the blocks within it.
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
    ) -> None:
        self.block_size = block_size
        self.window = window
        self.residency = Residency({GPU: num_gpu_blocks})
        self.tree = PrefixTree(fingerprint, block_size)
        self.num_evictable = 0
        self.num_evicted = 0
        self._policy = policy
        self._clock = clock
        self._caching = enable_prefix_caching
        self._view = _View(self.tree)
        self._computing: dict[BlockKey, BlockHolder] = {}
        self._copies = CopyBatch()

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
        return self.num_empty + self.num_evictable

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

    def lookup(self, seq: BlockHolder, *, use_cache: bool = True) -> Match:
        """What is cached of `seq.token_ids`; changes nothing but the keys memoised on `seq`.

        At least the last token is left to compute, because its logits are wanted.
        """
        if not self._caching or not use_cache:
            return Match()
        self._extend_keys(seq)
        match = self._walk(seq)
        depth = len(match.blocks)
        if depth < len(seq.block_keys) and self.is_computing(seq, seq.block_keys[depth]):
            match.next = Lookup.PENDING
        else:
            self._add_partial(seq, match)
        return match

    def acquire(self, seq: BlockHolder, match: Match) -> None:
        """Pin what matched and make it the beginning of the sequence's block table.

        The caller has checked `blocks_to_acquire` against `num_available`.
        """
        hint_of = self._hints(seq)
        for block in reversed(match.blocks):
            if block is not None:
                self._pin(block)
                self._policy.touch(block.key, hint_of(block.depth))
        seq.blocks = list(match.blocks)
        seq.block_table = [b.copies[GPU].slot if b is not None else 0 for b in match.blocks]
        seq.num_sealed = len(match.blocks)
        seq.num_released = next((i for i, b in enumerate(match.blocks) if b is not None), 0)
        seq.num_computed = match.num_tokens
        seq.table_version += 1
        if match.partial is not None:
            source, shared = match.partial
            self._policy.touch(source.key, hint_of(source.depth))
            self._append_copy_of(seq, source, shared)
        self._claim(seq)

    def blocks_to_acquire(self, match: Match, num_tokens: int, chunk: int) -> int:
        """How much `num_available` falls at most when the match is acquired and then grown to
        `num_tokens` in steps of `chunk`."""
        rescued = sum(1 for b in match.blocks if b is not None and b.pins == 0)
        grown = self.blocks_for(num_tokens) - len(match.blocks)
        source = 1 if match.partial is not None and match.partial[0].pins == 0 else 0
        return min(rescued + grown, self.blocks_to_hold(num_tokens, chunk)) + source

    def _extend_keys(self, seq: BlockHolder) -> None:
        if len(seq.block_keys) < len(seq.token_ids) // self.block_size:
            root = self.tree.root_key(seq.cache_salt)
            extend_keys(seq.block_keys, root, seq.token_ids, self.block_size)

    def _walk(self, seq: BlockHolder) -> Match:
        limit = (len(seq.token_ids) - 1) // self.block_size
        if self.window is not None:
            return self._walk_windowed(seq, limit)
        blocks: list[Block | None] = []
        get, is_ready = self.tree.get, self.residency.is_ready
        for key in seq.block_keys[:limit]:
            block = get(key)
            if block is None or not is_ready(block, GPU):
                break
            blocks.append(block)
        return Match(blocks, len(blocks) * self.block_size)

    def _walk_windowed(self, seq: BlockHolder, limit: int) -> Match:
        """The longest prefix all of whose blocks *within the window* of its end are cached."""
        ready = []
        for key in seq.block_keys[:limit]:
            block = self.tree.get(key)
            ready.append(
                block if block is not None and self.residency.is_ready(block, GPU) else None
            )
        run = 0  # cached blocks in a row, ending before `depth`
        best = 0
        for depth, block in enumerate(ready, start=1):
            run = run + 1 if block is not None else 0
            if run >= depth - self._first_needed(depth * self.block_size):
                best = depth
        first = self._first_needed(best * self.block_size) if best else 0
        blocks = [block if i >= first else None for i, block in enumerate(ready[:best])]
        return Match(blocks, best * self.block_size)

    def _first_needed(self, position: int) -> int:
        """The first block that a query at `position` (or later) may look at."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.block_size

    def _add_partial(self, seq: BlockHolder, match: Match) -> None:
        depth = len(match.blocks)
        start = depth * self.block_size
        end = min(start + self.block_size, len(seq.token_ids) - 1)
        last = match.blocks[-1] if match.blocks else self.tree.root(seq.cache_salt)
        if end <= start or last is None or not last.children:
            return
        best = self.tree.best_partial(last, pack_tokens(seq.token_ids[start:end]), GPU)
        if best is not None and self.residency.is_ready(best[0], GPU):
            match.partial = best
            match.num_tokens = start + best[1]

    # ------------------------------------------------------------------ who computes what

    def is_computing(self, seq: BlockHolder, key: BlockKey) -> bool:
        """Whether a running sequence other than `seq` is about to compute the block `key`."""
        owner = self._computing.get(key)
        return owner is not None and owner is not seq

    def _claim(self, seq: BlockHolder) -> None:
        """Tell others that this sequence is about to compute its remaining full blocks."""
        if self._caching:
            self._extend_keys(seq)
            for key in seq.block_keys[seq.num_sealed :]:
                self._computing.setdefault(key, seq)

    def _unclaim(self, seq: BlockHolder, first: int) -> None:
        for key in seq.block_keys[first:]:
            if self._computing.get(key) is seq:
                del self._computing[key]

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
            self._unpin(tail, None)
            seq.table_version += 1
        while len(seq.block_table) * self.block_size < num_tokens:
            self._append(seq)

    def _must_copy_tail(self, seq: BlockHolder) -> bool:
        if seq.num_computed % self.block_size == 0:
            return False
        tail = seq.blocks[-1]
        if tail is None or tail.pins == 1:
            return False
        return tail.pins - self._copies.sources.count(tail) > 1

    def _append(self, seq: BlockHolder) -> Block:
        if self.num_empty == 0:
            self._evict(1)
        block = Block(private_key(), len(seq.blocks))
        block.pins = 1
        seq.block_table.append(self.residency.begin_fill(block, GPU))
        seq.blocks.append(block)
        return block

    def _append_copy_of(self, seq: BlockHolder, source: Block, num_tokens: int) -> None:
        self._pin(source)
        block = self._append(seq)
        copy = BlockCopy(source.copies[GPU].slot, block.copies[GPU].slot, num_tokens)
        self._copies.copies.append(copy)
        self._copies.sources.append(source)

    def take_copies(self) -> CopyBatch:
        """The copy-on-write work since the last call; it belongs into the next plan."""
        batch, self._copies = self._copies, CopyBatch()
        return batch

    def finish_copies(self, batch: CopyBatch) -> None:
        """The copies were executed (or will never be): their sources may go."""
        for source in batch.sources:
            self._unpin(source, None)
        batch.sources.clear()

    # ------------------------------------------------------------------ seal

    def seal(self, seq: BlockHolder, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is computed and the tokens are final."""
        first, last = seq.num_sealed, num_tokens // self.block_size
        if self._caching and first < last:
            self._extend_keys(seq)
            hint_of = self._hints(seq)
            for index in range(first, last):
                self._seal_block(seq, index, hint_of(index))
                if self._computing.get(seq.block_keys[index]) is seq:
                    del self._computing[seq.block_keys[index]]
            seq.num_sealed = last
        if self.window is not None:
            self._release_behind(seq, num_tokens)

    def _seal_block(self, seq: BlockHolder, index: int, hint: AccessHint) -> None:
        block, key = seq.blocks[index], seq.block_keys[index]
        if block is None or block.in_tree:
            return
        known = self.tree.get(key)
        if known is not None and self.residency.is_ready(known, GPU):
            self._share(seq, index, known)
            return
        start = index * self.block_size
        tokens = pack_tokens(seq.token_ids[start : start + self.block_size])
        parent = self._parent_of(seq, index)
        self.tree.insert(block, key, parent, tokens)
        self.residency.commit_fill(block, GPU)
        policy_parent = parent.key if self.window is None and parent.depth >= 0 else None
        self._policy.insert(key, policy_parent, hint)

    def _share(self, seq: BlockHolder, index: int, known: Block) -> None:
        """Another sequence computed the same block first: use that one and free our own."""
        own = seq.blocks[index]
        self._pin(known)
        seq.blocks[index] = known
        seq.block_table[index] = known.copies[GPU].slot
        seq.table_version += 1
        if own is not None:
            self._unpin(own, None)

    def _parent_of(self, seq: BlockHolder, index: int) -> Block:
        """The tree node before block `index`; ghosts are made where the path has gone."""
        if index == 0:
            return self.tree.ensure_root(seq.cache_salt)
        before = seq.blocks[index - 1]
        if before is not None and before.in_tree:
            return before
        missing = index - 1
        while missing > 0 and self.tree.get(seq.block_keys[missing - 1]) is None:
            missing -= 1
        node = self.tree.get(seq.block_keys[missing - 1]) if missing else None
        node = node or self.tree.ensure_root(seq.cache_salt)
        for i in range(missing, index):
            known = self.tree.get(seq.block_keys[i])
            packed = pack_tokens(seq.token_ids[i * self.block_size : (i + 1) * self.block_size])
            node = known or self.tree.insert_ghost(seq.block_keys[i], node, packed)
        return node

    # ------------------------------------------------------------------ release

    def fork(self, parent: BlockHolder, child: BlockHolder, num_tokens: int) -> None:
        """Let `child` hold the blocks of `parent`'s first `num_tokens` tokens.

        Whoever writes into a shared tail first copies it.
        """
        count = self.blocks_for(num_tokens)
        child.blocks = parent.blocks[:count]
        for block in child.blocks:
            if block is not None:
                self._pin(block)
        child.block_table = parent.block_table[:count]
        child.block_keys = parent.block_keys[: num_tokens // self.block_size]
        child.num_computed = num_tokens
        child.num_sealed = min(parent.num_sealed, num_tokens // self.block_size)
        child.num_released = parent.num_released

    def release(self, seq: BlockHolder) -> None:
        """Take the sequence's pins away, tail first, and empty its block table."""
        self._unclaim(seq, seq.num_sealed)
        hint_of = self._hints(seq)
        for block in reversed(seq.blocks):
            if block is not None:
                self._unpin(block, hint_of(block.depth))
        seq.blocks = []
        seq.block_table = []
        seq.num_computed = seq.num_sealed = seq.num_released = 0
        seq.table_version += 1

    def _release_behind(self, seq: BlockHolder, num_tokens: int) -> None:
        """Drop the pins of blocks that no later query can look at."""
        first = min(self._first_needed(num_tokens), len(seq.blocks))
        if first <= seq.num_released:
            return
        hint_of = self._hints(seq)
        for index in range(seq.num_released, first):
            block = seq.blocks[index]
            if block is not None:
                seq.blocks[index] = None
                seq.block_table[index] = 0
                self._unpin(block, hint_of(index))
        seq.num_released = first
        seq.table_version += 1

    def reset(self) -> bool:
        """Forget every cached block; False (and nothing happens) while any block is held."""
        if self.num_available != self.num_blocks:
            return False
        self._evict(self.num_evictable, Why.REMOVED)
        return True

    # ------------------------------------------------------------------ pins and eviction

    def _pin(self, block: Block) -> None:
        if block.pins == 0 and block.in_tree:
            self._policy.set_evictable(block.key, False)
            self.num_evictable -= 1
        block.pins += 1

    def _unpin(self, block: Block, hint: AccessHint | None) -> None:
        if block.pins <= 0:
            raise InvariantError(f"block {block.key.hex()} is unpinned too often")
        block.pins -= 1
        if block.in_tree and hint is not None:
            self._policy.touch(block.key, hint)
        if block.pins:
            return
        if block.in_tree:
            self._policy.set_evictable(block.key, True)
            self.num_evictable += 1
        else:
            self.residency.drop(block, GPU)

    def _evict(self, n: int, why: Why = Why.EVICTED) -> None:
        victims = self._policy.propose(n, self._view)
        if len(victims) < n:
            raise InvariantError(f"{n} blocks to evict, the policy proposed {len(victims)}")
        for key in victims:
            block = self.tree.get(key) if isinstance(key, bytes) else None
            if block is None or block.pins:
                raise InvariantError(f"the eviction policy proposed {key!r}, which is not free")
            self.residency.drop(block, GPU)
            self._policy.forget(key, why)
            self.num_evictable -= 1
            self.tree.prune(block)
        if why is Why.EVICTED:
            self.num_evicted += n

    def _hints(self, seq: BlockHolder) -> _HintMaker:
        return _HintMaker(self._clock.now(), self.block_size, seq.priority)


class _HintMaker:
    """Makes the hints of one access; only the depth differs between its blocks."""

    __slots__ = ("now", "priority", "tokens")

    def __init__(self, now: float, tokens: int, priority: int) -> None:
        self.now, self.tokens, self.priority = now, tokens, priority

    def __call__(self, depth: int) -> AccessHint:
        return AccessHint(self.now, depth, self.tokens, priority=self.priority)


def held_blocks(sequences: Sequence[BlockHolder]) -> list[Block]:
    """Every block reference that the sequences hold, repeated as often as it is held."""
    return [block for seq in sequences for block in seq.blocks if block is not None]
