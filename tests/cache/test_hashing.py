"""Block keys."""

from __future__ import annotations

from hashlib import blake2b

from tierkv.cache.hashing import block_key, extend_keys, pack_tokens, root_key


def test_keys_are_the_documented_hash() -> None:
    """Pinned: keys are stored on disk and shared between machines."""
    root = root_key(b"model", "salt")
    expected = blake2b(b"tierkv root\x00\x00\x00\x05modelsalt", digest_size=16).digest()
    assert root == expected
    assert pack_tokens([1, 256]) == b"\x00\x00\x00\x01\x00\x00\x01\x00"
    key = blake2b(root + b"\x00\x00\x00\x01\x00\x00\x01\x00", digest_size=16).digest()
    assert block_key(root, pack_tokens([1, 256])) == key
    assert key.hex() == "39e0fb93c332ba39c557c84c40722dc6"


def test_extend_adds_only_full_blocks_and_continues() -> None:
    root = root_key(b"model", "")
    whole: list[bytes] = []
    extend_keys(whole, root, list(range(23)), 4)
    assert len(whole) == 5
    parts: list[bytes] = []
    for length in (3, 9, 10, 23):
        extend_keys(parts, root, list(range(length)), 4)
    assert parts == whole
    assert whole[0] == block_key(root, pack_tokens([0, 1, 2, 3]))
    assert whole[1] == block_key(whole[0], pack_tokens([4, 5, 6, 7]))


def test_fingerprint_and_salt_do_not_run_into_each_other() -> None:
    assert root_key(b"ab", "c") != root_key(b"a", "bc")
