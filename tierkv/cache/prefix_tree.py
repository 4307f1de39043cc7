"""The prefix tree: which full blocks are known, by key and by ancestry.

A node is a `Block`. It stays while it has a copy in some tier, a pin, or a child; a node without
a copy is a *ghost* that only keeps the path to its children (a window released it, say). Private
blocks (tails that are not full yet) are `Block`s too, but not in the tree.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tierkv.cache.hashing import TOKEN_BYTES, root_key
from tierkv.errors import InvariantError
from tierkv.types import BlockKey, TierName

if TYPE_CHECKING:
    from tierkv.cache.kept import Kept
    from tierkv.cache.shares import Share

_SCAN_CHILDREN = 8


class Copy:
    """A block's place in one tier; its state is written by `Residency` only.

    Attributes:
        readers: moves that read the copy now.
        is_listed, is_evictable: what the tier's eviction policy was told of it (`Evictor`).
        is_prefetched: nobody has used it or waited for it since it was begun for later.
        wanted: its retention (`kept`) when a waiting sequence will use it, else 0.
    """

    __slots__ = (
        "is_evictable",
        "is_listed",
        "is_prefetched",
        "readers",
        "slot",
        "state",
        "wanted",
    )

    def __init__(self, slot: int, state: object) -> None:
        self.slot = slot
        self.state = state
        self.readers = 0
        self.is_listed = False
        self.is_prefetched = False
        self.wanted = 0
        self.is_evictable = False


class Block:
    """A run of `block_size` tokens' KV, wherever its copies are.

    Attributes:
        key: content key of a full block, random id of a private one.
        tokens: packed token ids (`hashing.pack_tokens`), empty while private.
        depth: blocks before it; -1 for the root of a salt.
        pins: how many sequences or copies in flight hold its copy in the GPU pool.
        busy: moves that read its GPU copy, plus children that are busy and have no pin: while any
            is, the block cannot leave the pool before them.
        copies: tier -> Copy; absent means EMPTY there.
        in_tree: whether `PrefixTree` owns it.
        owner: the tenant's share that it counts for; a root's is that of its salt.
        kept: how long it is wanted, if anybody said so.
    """

    __slots__ = (
        "key",
        "parent",
        "children",
        "sorted_children",
        "tokens",
        "depth",
        "pins",
        "busy",
        "copies",
        "in_tree",
        "owner",
        "kept",
    )

    def __init__(self, key: BlockKey, depth: int) -> None:
        self.key = key
        self.parent: Block | None = None
        self.children: dict[bytes, Block] = {}
        self.sorted_children: list[bytes] | None = None
        self.tokens = b""
        self.depth = depth
        self.pins = 0
        self.busy = 0
        self.copies: dict[TierName, Copy] = {}
        self.in_tree = False
        self.owner: Share | None = None
        self.kept: Kept | None = None


class PrefixTree:
    """Full blocks by key; one root per cache salt.

    Args:
        fingerprint: of the model; part of every key.
        block_size: tokens per block.

    Attributes:
        num_joined: blocks recovered without their parent that it has joined since.
    """

    def __init__(self, fingerprint: bytes, block_size: int) -> None:
        self.block_size = block_size
        self.num_joined = 0
        self._fingerprint = fingerprint
        self._index: dict[BlockKey, Block] = {}
        self._roots: dict[BlockKey, Block] = {}
        self._root_keys: dict[str, BlockKey] = {}

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._index.values())

    @property
    def roots(self) -> list[Block]:
        return list(self._roots.values())

    def root_key(self, salt: str) -> BlockKey:
        key = self._root_keys.get(salt)
        return key if key is not None else root_key(self._fingerprint, salt)

    def get(self, key: BlockKey) -> Block | None:
        return self._index.get(key)

    def root(self, salt: str) -> Block | None:
        """The root under which this salt's first blocks hang, if there are any."""
        return self._roots.get(self.root_key(salt))

    def ensure_root(self, salt: str) -> Block:
        key = self.root_key(salt)
        self._root_keys[salt] = key
        return self._roots.get(key) or self.add_root(key)

    def add_root(self, key: BlockKey) -> Block:
        """The root of a salt of which only the key is known (blocks that were stored earlier)."""
        root = self._roots[key] = Block(key, -1)
        root.in_tree = True
        return root

    def find(self, key: BlockKey) -> Block | None:
        """A block or a root."""
        return self._index.get(key) or self._roots.get(key)

    def insert(self, block: Block, key: BlockKey, parent: Block, tokens: bytes) -> None:
        """Make a private block public under `parent`; takes a ghost of the same key's place."""
        ghost = self._index.get(key)
        if ghost is not None:
            self._replace(ghost, block)
        block.key, block.tokens = key, tokens
        block.parent, block.depth, block.in_tree = parent, parent.depth + 1, True
        self._index[key] = block
        if parent.sorted_children is not None and tokens not in parent.children:
            insort(parent.sorted_children, tokens)
        parent.children[tokens] = block
        if key in self._roots:
            self._join(self._roots.pop(key), block)

    def insert_ghost(self, key: BlockKey, parent: Block, tokens: bytes) -> Block:
        """A node without a copy, so that a block deeper down can be reached."""
        block = Block(key, parent.depth + 1)
        self.insert(block, key, parent, tokens)
        return block

    def _replace(self, ghost: Block, block: Block) -> None:
        if ghost.copies or ghost.pins:
            raise InvariantError(f"block {ghost.key.hex()} is in the tree twice")
        block.children, block.sorted_children = ghost.children, ghost.sorted_children
        for child in block.children.values():
            child.parent = block
        block.busy, ghost.busy = block.busy + ghost.busy, 0
        ghost.in_tree = False

    def _join(self, stray: Block, block: Block) -> None:
        """Blocks that were recovered without their parent have found it."""
        self.num_joined += len(stray.children)
        block.children |= stray.children
        block.sorted_children = None
        pending = [(block, child) for child in stray.children.values()]
        for parent, child in pending:
            child.parent, child.depth = parent, parent.depth + 1
            pending.extend((child, grandchild) for grandchild in child.children.values())
        block.busy += stray.busy

    def prune(self, block: Block) -> None:
        """Drop the node, and then each ancestor, that nothing needs any more."""
        node: Block | None = block
        while node is not None and not (node.copies or node.pins or node.children):
            parent = node.parent
            self._unlink(node)
            node = parent

    def _unlink(self, node: Block) -> None:
        node.in_tree = False
        parent, node.parent = node.parent, None
        if parent is None:
            del self._roots[node.key]
            self._root_keys = {s: key for s, key in self._root_keys.items() if key != node.key}
            return
        del self._index[node.key]
        del parent.children[node.tokens]
        if parent.sorted_children is not None:
            del parent.sorted_children[bisect_left(parent.sorted_children, node.tokens)]

    def best_partial(
        self, parent: Block, tokens: bytes, tier: TierName
    ) -> tuple[Block, int] | None:
        """The child of `parent` in `tier` that shares the longest run of leading tokens.

        Args:
            tokens: packed ids of at most one block.

        Returns:
            The child and the number of shared tokens (at least 1), or None.
        """
        best: tuple[Block, int] | None = None
        for child in self._near(parent, tokens):
            if tier in child.copies:
                shared = _common_tokens(child.tokens, tokens)
                if shared > (best[1] if best else 0):
                    best = (child, shared)
        return best

    def _near(self, parent: Block, tokens: bytes) -> list[Block]:
        """Children among which the longest common prefix must be: its neighbours in order."""
        if len(parent.children) <= _SCAN_CHILDREN:
            return list(parent.children.values())
        if parent.sorted_children is None:
            parent.sorted_children = sorted(parent.children)
        at = bisect_left(parent.sorted_children, tokens)
        near = parent.sorted_children[max(0, at - _SCAN_CHILDREN // 2) : at + _SCAN_CHILDREN // 2]
        return [parent.children[packed] for packed in near]


def _common_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens two packed runs share."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // TOKEN_BYTES
    difference = int.from_bytes(a[:size], "big") ^ int.from_bytes(b[:size], "big")
    equal_bits = size * 8 - difference.bit_length()
    return equal_bits // (8 * TOKEN_BYTES)
