"""What the cache needs of a sequence: its tokens, and the place where its blocks are noted."""

from __future__ import annotations

from typing import Protocol

from tierkv.cache.prefix_tree import Block
from tierkv.types import BlockKey


class BlockHolder(Protocol):
    """A token stream that holds blocks; `engine.request.Sequence` is one.

    The cache writes every field but `seq_id`, `token_ids`, `cache_salt` and `priority`; the
    scheduler advances `num_computed` after it had the cache `grow` the table.
    """

    seq_id: int
    token_ids: list[int]
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
    def priority(self) -> int: ...
