"""Whether a request could run at all."""

from __future__ import annotations

from tierkv.cache.tiered_cache import TieredCache
from tierkv.engine.request import Request
from tierkv.errors import CapacityError, RequestError


def check_capacity(request: Request, cache: TieredCache, chunk: int) -> None:
    """Refuse a request that could not even run alone.

    Args:
        request: what it asks for.
        cache: whose pool it needs.
        chunk: tokens that a step computes at most.

    Raises:
        CapacityError: says how many blocks it needs and how many there are.
    """
    prompt = len(request.prompt_token_ids)
    total = prompt + request.max_tokens
    # The last sampled token is never fed back, so its KV needs no room.
    need = cache.blocks_to_hold(total - 1, chunk)
    if need > cache.num_blocks:
        raise CapacityError(
            "max_tokens",
            request.max_tokens,
            f"prompt ({prompt}) + max_tokens need {need} KV blocks of "
            f"{cache.block_size} tokens, the pool has {cache.num_blocks}: shorten "
            "the prompt, lower max_tokens, or give the pool more memory",
        )


def check_parallel(field: str, wanted: int, limit: int) -> None:
    """Refuse more sequences than run at once.

    Args:
        field: of the request that asks for them.
        wanted: how many.
        limit: the scheduler's.

    Raises:
        RequestError: says what the limit comes from.
    """
    if wanted > limit:
        fix = f"must be at most {limit}, the sequences that run at once: lower it, or raise"
        fix += " max_num_seqs, the pool's blocks or max_num_batched_tokens, whichever is least"
        raise RequestError(field, wanted, fix)
