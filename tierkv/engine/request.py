"""A request and its sequences: what they are made of, and the states a sequence may take."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

from tierkv.errors import InvariantError
from tierkv.types import BlockKey, FinishReason

if TYPE_CHECKING:
    from tierkv.cache.prefix_tree import Block
    from tierkv.cache.shares import Share
    from tierkv.engine.grammar import Grammar
    from tierkv.engine.kv_hints import KvHints
    from tierkv.engine.outputs import PromptSources
    from tierkv.engine.sampling_params import SamplingParams


class SeqState(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # holds no block, in the queue
    LOADING = "loading"  # blocks on their way up from a lower tier
    RUNNING = "running"  # holds blocks, part of steps
    SWAPPING = "swapping"  # private tail on its way down
    SWAPPED = "swapped"  # private tail in a lower tier
    FINISHED = "finished"


QUEUED = (SeqState.WAITING, SeqState.SWAPPING, SeqState.SWAPPED)
"""States of a sequence in the waiting queue."""

TRANSITIONS: dict[SeqState, frozenset[SeqState]] = {
    SeqState.WAITING: frozenset({SeqState.LOADING, SeqState.RUNNING, SeqState.FINISHED}),
    SeqState.LOADING: frozenset({SeqState.RUNNING, SeqState.WAITING, SeqState.FINISHED}),
    SeqState.RUNNING: frozenset({SeqState.SWAPPING, SeqState.WAITING, SeqState.FINISHED}),
    SeqState.SWAPPING: frozenset({SeqState.SWAPPED, SeqState.WAITING, SeqState.FINISHED}),
    SeqState.SWAPPED: frozenset({SeqState.LOADING, SeqState.WAITING, SeqState.FINISHED}),
    SeqState.FINISHED: frozenset(),
}


class Request:
    """One API call: a prompt, how to sample it, and the sequences that answer it.

    Attributes:
        request_id: chosen by the caller, unique among live requests.
        prompt_token_ids: at least one token.
        params: checked sampling parameters.
        priority: lower runs first under the `priority` order (as in vLLM).
        arrival_s: the engine clock when it was added.
        cache_salt: requests share cached blocks only within one salt.
        eos_token_ids: tokens that end a sequence unless `params.ignore_eos`.
        is_stepped: the caller chooses every token (beam search): a sequence stops after each
            step until it is advanced or forked.
        grammar: what `params.structured_outputs` asks for, compiled.
        num_cached_tokens, prompt_sources: prompt tokens that were reused, together and by tier.
        num_head_tokens: prompt tokens computed, though a tier had them, while others were loaded.
        tenant: whose it is, empty when nobody says.
        hints: what it says of its own KV.
        turn: its number within its session, from 1; 0 without one.
        owner: whose quota its blocks count for, if anybody's.
    """

    __slots__ = (
        "request_id",
        "prompt_token_ids",
        "params",
        "priority",
        "arrival_s",
        "cache_salt",
        "eos_token_ids",
        "stop_token_ids",
        "max_tokens",
        "is_stepped",
        "grammar",
        "tenant",
        "hints",
        "turn",
        "owner",
        "sequences",
        "num_cached_tokens",
        "num_head_tokens",
        "prompt_sources",
        "first_scheduled_s",
        "first_token_s",
        "num_preemptions",
        "num_prompt_logprobs",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        arrival_s: float = 0.0,
        priority: int = 0,
        cache_salt: str = "",
        eos_token_ids: frozenset[int] = frozenset(),
        is_stepped: bool = False,
        grammar: Grammar | None = None,
        tenant: str = "",
        hints: KvHints | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.priority = priority
        self.arrival_s = arrival_s
        self.cache_salt = cache_salt
        self.eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.stop_token_ids = self.eos_token_ids | frozenset(params.stop_token_ids)
        self.max_tokens = max_tokens
        self.is_stepped = is_stepped
        self.grammar = grammar
        self.tenant, self.hints = tenant, hints
        self.turn = 0
        self.owner: Share | None = None
        self.sequences: list[Sequence] = []
        self.num_cached_tokens: int | None = None
        self.num_head_tokens = 0
        self.prompt_sources: PromptSources | None = None
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0

    @property
    def is_finished(self) -> bool:
        return all(seq.state is SeqState.FINISHED for seq in self.sequences)


class Sequence:
    """One token stream of a request.

    Token counts, always: `num_computed <= len(token_ids) + num_inflight`.

    Attributes:
        token_ids: prompt and generated tokens whose values are known.
        num_prompt_tokens: how many of them are the prompt's.
        num_computed: tokens whose KV is in the pool, or will be once the planned steps ran.
        num_inflight: tokens planned to be sampled whose values `commit` has not supplied yet.
        blocks: logical blocks, None behind a sliding window; `block_table` their GPU slots.
        block_keys: keys of the full blocks of `token_ids`, filled on demand.
        table_version: changes whenever an existing entry of `block_table` does (not on append).
        epoch: counts preemptions; a planned row of an older epoch is stale.
        num_uncommitted: planned rows whose step has not been committed.
        admitted_tokens: how long it was when it began to run; its time slice counts from there.
        queued_s: when it took its place in the queue.
        waits_for: key of a block that another sequence was computing at the last look.
        num_loading: blocks in the table that are still on their way into the pool.
        load_from, load_tokens: once it has computed the blocks before `load_from`, it goes on after
            `load_tokens` tokens, which are being loaded; 0 tokens when nothing is.
        tail, tail_tokens: the partial block of a swapped sequence, and how many tokens it reaches.
        is_paused: a stepped sequence whose next token its caller has not chosen yet.
        on_move: is told of every change of `state`, and what it was before.
    """

    __slots__ = (
        "seq_id",
        "request",
        "index",
        "token_ids",
        "num_prompt_tokens",
        "num_computed",
        "num_sealed",
        "num_inflight",
        "state",
        "finish_reason",
        "stop_reason",
        "blocks",
        "block_table",
        "block_keys",
        "num_released",
        "table_version",
        "epoch",
        "is_paused",
        "waits_for",
        "num_loading",
        "load_from",
        "load_tokens",
        "tail",
        "tail_tokens",
        "scheduled_order",
        "num_uncommitted",
        "admitted_tokens",
        "queued_s",
        "on_move",
    )

    def __init__(self, seq_id: int, request: Request, index: int, token_ids: list[int]) -> None:
        self.seq_id = seq_id
        self.request = request
        self.index = index
        self.token_ids = token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed = 0
        self.num_sealed = 0
        self.num_inflight = 0
        self.state = SeqState.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.blocks: list[Block | None] = []
        self.block_table: list[int] = []
        self.block_keys: list[BlockKey] = []
        self.num_released = 0
        self.table_version = 0
        self.epoch = 0
        self.is_paused = False
        self.waits_for: BlockKey | None = None
        self.num_loading = 0
        self.load_from = 0
        self.load_tokens = 0
        self.tail: Block | None = None
        self.tail_tokens = 0
        self.scheduled_order = 0
        self.num_uncommitted = 0
        self.admitted_tokens = 0
        self.queued_s = request.arrival_s
        self.on_move: Callable[[Sequence, SeqState], None] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens including those still in flight."""
        return len(self.token_ids) + self.num_inflight

    @property
    def cache_salt(self) -> str:
        return self.request.cache_salt

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def hints(self) -> KvHints | None:
        return self.request.hints

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def turn(self) -> int:
        return self.request.turn

    @property
    def owner(self) -> Share | None:
        return self.request.owner

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        """Tokens whose KV is still to be computed before the next sample; 0 when there is none."""
        remaining = len(self.token_ids) + self.num_inflight - self.num_computed
        if self.num_inflight:
            generated = len(self.token_ids) + self.num_inflight - self.num_prompt_tokens
            return 0 if generated >= self.request.max_tokens else remaining
        return remaining

    def move_to(self, state: SeqState) -> None:
        """The only writer of `state`."""
        if state not in TRANSITIONS[self.state]:
            raise InvariantError(f"sequence {self.seq_id}: {self.state.name} -> {state.name}")
        before, self.state = self.state, state
        if self.on_move is not None:
            self.on_move(self, before)
