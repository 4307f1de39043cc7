"""The bytes of whole blocks, over ranks that each have the KV of their own heads.

A block is `[num_layers, 2, num_kv_heads, block_size * head_dim]`; a rank has a run of the heads. So
what is exported is what an engine without ranks would export, and can be imported by one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from tierkv.cache.layout import KVLayout
from tierkv.engine.tp.group import TpGroup
from tierkv.protocols import BlockPort
from tierkv.types import BlockKey, TierName


def join_block(parts: Sequence[bytes], part: KVLayout, whole: KVLayout) -> bytes:
    """A whole block from those of the ranks; where each rank has all heads, the first one's."""
    if part.num_kv_heads == whole.num_kv_heads:
        return parts[0]
    shape = (part.num_layers * 2, part.num_kv_heads, -1)
    return np.concatenate([_bytes(p).reshape(shape) for p in parts], axis=1).tobytes()


def split_block(payload: bytes, part: KVLayout, whole: KVLayout) -> list[bytes]:
    """Each rank's part of a whole block."""
    if part.num_kv_heads == whole.num_kv_heads:
        return [payload] * part.num_shards
    planes = _bytes(payload).reshape(whole.num_layers * 2, part.num_shards, -1)
    return [planes[:, rank].tobytes() for rank in range(part.num_shards)]


def _bytes(payload: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.frombuffer(payload, dtype=np.uint8)


class TpPort:
    """A `BlockPort` over the ports of all ranks.

    Args:
        local: of rank 0.
        group: the other ranks.
        part, whole: what a rank's block looks like, and a whole one.
    """

    def __init__(self, local: BlockPort, group: TpGroup, part: KVLayout, whole: KVLayout) -> None:
        self._local, self._group = local, group
        self._part, self._whole = part, whole

    def read(self, tier: TierName, slot: int, key: BlockKey) -> Future[bytes | None]:
        """Also memory answers when all ranks have, and not at once."""
        found: Future[bytes | None] = Future()
        parts = [self._local.read(tier, slot, key)]
        parts += [worker.read(tier, slot, key) for worker in self._group.workers]
        waiting, lock = set(range(len(parts))), threading.Lock()

        def note(rank: int, _: Future[bytes | None]) -> None:
            with lock:
                waiting.discard(rank)
                if waiting or found.done():
                    return
                found.set_result(self._join([part.result() for part in parts]))

        for rank, part in enumerate(parts):
            part.add_done_callback(partial(note, rank))
        return found

    def _join(self, parts: list[bytes | None]) -> bytes | None:
        there = [part for part in parts if part is not None]
        return join_block(there, self._part, self._whole) if len(there) == len(parts) else None

    def write(self, slot: int, payload: bytes) -> None:
        own, *others = split_block(payload, self._part, self._whole)
        self._local.write(slot, own)
        for worker, part in zip(self._group.workers, others, strict=True):
            worker.send("write", slot, part)

    def give_back(self) -> int:
        self._group.tell("give_back")
        return self._local.give_back() * self._part.num_shards
