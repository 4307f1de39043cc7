"""What the cache needs of a sequence: its tokens, and the place where its blocks are noted."""

from __future__ import annotations

from typing import Protocol

from tierkv.cache.prefix_tree import Block
from tierkv.cache.shares import Share
from tierkv.types import BlockKey


class Wishes(Protocol):
    """What a sequence's request says of its KV; `engine.kv_hints.KvHints` is one."""

    @property
    def ttl(self) -> float | None: ...

    @property
    def priority(self) -> int: ...

    @property
    def no_store(self) -> bool: ...

    @property
    def session_id(self) -> str: ...

    @property
    def turn(self) -> str: ...


class BlockHolder(Protocol):
    """A token stream that holds blocks; `engine.request.Sequence` is one.

    The cache writes every field but `seq_id`, `token_ids`, `num_prompt_tokens`, `cache_salt` and
    `priority`; the scheduler advances `num_computed` after it had the cache `grow` the table.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int
    num_sealed: int
    num_released: int
    blocks: list[Block | None]
    block_table: list[int]
    block_keys: list[BlockKey]
    table_version: int
    num_loading: int
    load_from: int
    load_tokens: int
    tail: Block | None
    tail_tokens: int

    @property
    def cache_salt(self) -> str: ...

    @property
    def hints(self) -> Wishes | None: ...

    @property
    def tenant(self) -> str: ...

    @property
    def turn(self) -> int: ...

    @property
    def owner(self) -> Share | None: ...

    @property
    def priority(self) -> int: ...


def is_stored(seq: BlockHolder) -> bool:
    """Whether others may find what the sequence computes."""
    return seq.hints is None or not seq.hints.no_store
