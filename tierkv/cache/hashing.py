"""Keys of full blocks: equal content under equal ancestry has an equal key, anywhere, forever.

    root key  = blake2b-128("tierkv root" | model fingerprint | cache salt)
    block key = blake2b-128(parent key | token ids, 4 bytes each, big-endian)

The key of a block thus covers every token before it. Big-endian ids make the byte order of two
blocks the order of their tokens, which the tree uses to find the longest common prefix.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from tierkv.types import BlockKey

KEY_BYTES = 16
TOKEN_BYTES = 4


def root_key(fingerprint: bytes, salt: str) -> BlockKey:
    """The parent key of every first block computed by one model under one salt."""
    size = len(fingerprint).to_bytes(4, "big")
    return blake2b(
        b"tierkv root" + size + fingerprint + salt.encode(), digest_size=KEY_BYTES
    ).digest()


def block_key(parent: BlockKey, tokens: bytes) -> BlockKey:
    """The key of the block that holds `tokens` (packed ids) after `parent`."""
    return blake2b(parent + tokens, digest_size=KEY_BYTES).digest()


def private_key() -> BlockKey:
    """A random id for a block whose content is not final."""
    return os.urandom(KEY_BYTES)


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as 4 big-endian bytes each."""
    packed = array("I", token_ids)
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def extend_keys(
    keys: list[BlockKey], root: BlockKey, token_ids: Sequence[int], block_size: int
) -> None:
    """Append to `keys` those of the full blocks of `token_ids` that it does not have yet."""
    first, last = len(keys), len(token_ids) // block_size
    if first >= last:
        return
    packed = pack_tokens(token_ids[first * block_size : last * block_size])
    step = block_size * TOKEN_BYTES
    key = keys[-1] if keys else root
    for offset in range(0, len(packed), step):
        key = block_key(key, packed[offset : offset + step])
        keys.append(key)
