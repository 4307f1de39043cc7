"""The prefix tree against a plain dictionary of prefixes."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.cache.hashing import block_key, pack_tokens
from tierkv.cache.prefix_tree import Block, Copy, PrefixTree
from tierkv.types import TierName

GPU = TierName.GPU


def insert(tree: PrefixTree, parent: Block, tokens: list[int]) -> Block:
    block = Block(b"private", parent.depth + 1)
    block.copies[GPU] = Copy(0, None)
    packed = pack_tokens(tokens)
    tree.insert(block, block_key(parent.key, packed), parent, packed)
    return block


def common(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=60),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_best_partial_is_the_longest_common_prefix(
    children: list[list[int]], wanted: list[int], shuffle: random.Random
) -> None:
    tree = PrefixTree(b"", 4)
    root = tree.ensure_root("")
    alive = {}
    for tokens in children:
        if tuple(tokens) not in alive:
            alive[tuple(tokens)] = insert(tree, root, tokens)
        if shuffle.random() < 0.3:
            gone = alive.pop(shuffle.choice(list(alive)))
            gone.copies.clear()
            tree.prune(gone)
            root = tree.ensure_root("")
        best = tree.best_partial(root, pack_tokens(wanted), GPU)
        longest = max((common(list(t), wanted) for t in alive), default=0)
        assert (best[1] if best else 0) == longest
        if best:
            assert common(list(_tokens(best[0])), wanted) == longest


def _tokens(block: Block) -> list[int]:
    return [int.from_bytes(block.tokens[i : i + 4], "big") for i in range(0, len(block.tokens), 4)]


def test_prune_takes_the_whole_dead_path_and_the_root() -> None:
    tree = PrefixTree(b"", 2)
    root = tree.ensure_root("salt")
    first = insert(tree, root, [1, 2])
    second = insert(tree, first, [3, 4])
    first.copies.clear()  # a ghost now: it keeps the path to its child
    tree.prune(first)
    assert len(tree) == 2
    second.copies.clear()
    tree.prune(second)
    assert len(tree) == 0 and tree.roots == []


def test_a_block_takes_its_ghosts_place_and_children() -> None:
    tree = PrefixTree(b"", 2)
    root = tree.ensure_root("")
    packed = pack_tokens([1, 2])
    ghost = tree.insert_ghost(block_key(root.key, packed), root, packed)
    child = insert(tree, ghost, [3, 4])
    real = insert(tree, root, [1, 2])
    assert child.parent is real and real.children[child.tokens] is child
    assert tree.get(real.key) is real and not ghost.in_tree
