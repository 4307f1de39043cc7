"""Blocks that were recovered without their parent belong to its owner once it is there again."""

from __future__ import annotations

from hand_mover import BLOCK, CPU, NVME, Bench, Holder

from tierkv.cache.check import check_cache
from tierkv.cache.hashing import extend_keys, pack_tokens
from tierkv.cache.recovery import recover
from tierkv.cache.shares import Share, adopt_salt, set_shares
from tierkv.cache.transfer import take_in
from tierkv.policies import registry
from tierkv.storage.base import StoredBlock
from tierkv.types import BlockKey

TOKENS = list(range(3 * BLOCK))


class Port:
    """Takes bytes."""

    def write(self, slot: int, payload: bytes) -> None:
        assert len(payload) == 1


def bench_with_strays() -> tuple[Bench, Share, list[BlockKey]]:
    """A tenant's chain of three blocks, the first of which was lost while the engine was away."""
    bench, share = Bench(8, cpu=8, nvme=8), Share("a", {NVME: 8})
    keys: list[BlockKey] = []
    extend_keys(keys, bench.cache.tree.root_key("a"), TOKENS, BLOCK)
    stored = [
        StoredBlock(n, keys[n], keys[n - 1], packed(n), generation=n, hits=0, last_use=0.0)
        for n in (1, 2)
    ]
    recover(bench.cache, stored)
    set_shares(bench.cache, {"a": share}, lambda tier: registry.create("eviction", "lru"))
    adopt_salt(bench.cache, "a", share)
    assert share.counts[NVME] == 0
    return bench, share, keys


def packed(number: int) -> bytes:
    return pack_tokens(TOKENS[number * BLOCK : (number + 1) * BLOCK])


def holder_of(bench: Bench, share: Share, num_blocks: int) -> Holder:
    seq = bench.sequence(TOKENS[: num_blocks * BLOCK])
    seq.cache_salt = seq.tenant = "a"
    seq.owner = share
    return seq


def test_a_parent_that_is_computed_again_gives_them_its_owner() -> None:
    bench, share, _ = bench_with_strays()
    seq = holder_of(bench, share, 1)
    bench.admit(seq)
    bench.cache.grow(seq, BLOCK)
    seq.num_computed = BLOCK
    bench.cache.seal(seq, BLOCK)
    assert share.counts[NVME] == 2
    check_cache(bench.cache, [seq])


def test_a_parent_that_comes_from_elsewhere_gives_them_its_owner() -> None:
    bench, share, keys = bench_with_strays()
    root = bench.cache.tree.root_key("a")
    assert take_in(bench.cache, Port(), "a", keys[0], root, packed(0), b"x") == "taken"
    assert share.counts[NVME] == 2
    check_cache(bench.cache, [])


def test_they_count_in_the_tier_they_are_loaded_into_too() -> None:
    bench, share, keys = bench_with_strays()
    root = bench.cache.tree.root_key("a")
    take_in(bench.cache, Port(), "a", keys[0], root, packed(0), b"x")
    bench.settle()
    moves = bench.cache.lower
    assert moves is not None
    stray = bench.cache.tree.get(keys[1])
    assert stray is not None
    assert moves.promote(stray) == 1
    bench.settle()
    assert CPU in stray.copies
    assert share.counts[CPU] == sum(CPU in block.copies for block in bench.cache.tree)
    check_cache(bench.cache, [])


def test_one_that_is_computed_beside_them_gives_them_its_owner() -> None:
    """Where nobody has found the parent: with a window nobody needs it."""
    bench, share, keys = bench_with_strays()
    seq = holder_of(bench, share, 2)
    bench.cache.grow(seq, 2 * BLOCK)
    seq.num_computed, seq.num_sealed = 2 * BLOCK, 1
    bench.cache.seal(seq, 2 * BLOCK)
    assert seq.blocks[1] is bench.cache.tree.get(keys[1])
    assert share.counts[NVME] == 2
    check_cache(bench.cache, [seq])
