"""The engine: requests in, token ids out, one step at a time."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tierkv.cache.check import check_cache
from tierkv.cache.lower_tiers import MoveLimits, TierSpec
from tierkv.cache.recovery import forget_all, recover
from tierkv.cache.tiered_cache import TieredCache
from tierkv.config import EngineConfig, per_tier
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.grammar import Grammar, GrammarCompiler
from tierkv.engine.kv_control import KvControl
from tierkv.engine.kv_hints import KvHints
from tierkv.engine.outputs import SequenceOutput
from tierkv.engine.policy_options import make_policy, scheduling_policies
from tierkv.engine.request import Request, SeqState, Sequence
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.scheduler import Scheduler
from tierkv.engine.steps import Steps
from tierkv.engine.tier_metrics import tier_metrics
from tierkv.errors import EngineDeadError, RequestError
from tierkv.metrics import Metrics
from tierkv.policies.base import EvictionPolicy
from tierkv.protocols import BlockPort, Clock, Executor, Mover, Sampler, Workers
from tierkv.storage.arena import HostArena
from tierkv.storage.base import BlockStore, StoredBlock
from tierkv.types import FinishReason, TierName

if TYPE_CHECKING:
    from tierkv.engine.beam import BeamSearchParams

logger = logging.getLogger(__name__)

_WAIT_S = 0.005  # for a move, when there is nothing to compute
_RESET_S = 30.0
_CLOSE_S = 5.0  # what has not gone down by then is not kept


@dataclass(slots=True)
class EngineRequest:
    """A request as it crosses the process border. See `Request` for the fields; with `beam` the
    engine's process searches, and `params` only say how the results are shown."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    is_stepped: bool = False
    tenant: str = ""
    hints: KvHints | None = None
    beam: BeamSearchParams | None = None


@dataclass(slots=True)
class EngineInfo:
    """What the front end needs to know of a loaded engine."""

    model: str
    tokenizer: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_gpu_blocks: int
    block_size: int
    dtype: str
    device: str
    fingerprint: bytes = b""
    window: int | None = None
    tiers: list[str] = field(default_factory=list)
    layout: str = ""
    block_bytes: int = 1


@dataclass(slots=True)
class LowerTierSetup:
    """The tiers below the pool, opened and ready.

    Attributes:
        specs: slots and policies, from hot to cold.
        mover: moves blocks between all of them.
        slot_bytes: bytes of a block.
        limits: how much may move.
        cost: what computing and moving take.
        stored: what a persistent tier brought back.
        close: lets go of all of them, when nothing moves any more.
        lines: what was opened, for people.
        arena, store: the tiers themselves.
    """

    specs: list[TierSpec]
    mover: Mover
    slot_bytes: int
    limits: MoveLimits
    cost: MeasuredCost
    stored: list[StoredBlock]
    close: Callable[[], None]
    lines: list[str] = field(default_factory=list)
    arena: HostArena | None = None
    store: BlockStore | None = None


class MonotonicClock:
    """Real time."""

    def now(self) -> float:
        return time.monotonic()


class EngineCore:
    """Owns the scheduler and the cache; drives executor and sampler.

    Args:
        config: engine options.
        info: facts of the loaded model and its pool.
        executor, sampler, clock: the seams of `tierkv.protocols`.
        tiers: the tiers below the pool, if there are any.
        grammars: compiles what requests say of their outputs; None refuses such requests.
        port: the bytes of blocks, for export, import and sleep; None refuses these.
        workers: the processes that run the other parts of the model, if it has any.

    Attributes:
        steps: runs what the scheduler plans.

    Raises:
        ConfigError: a policy that does not exist.
    """

    def __init__(
        self,
        config: EngineConfig,
        info: EngineInfo,
        executor: Executor,
        sampler: Sampler,
        clock: Clock,
        tiers: LowerTierSetup | None = None,
        grammars: GrammarCompiler | None = None,
        port: BlockPort | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.info, self.grammars = info, grammars
        self._clock = clock
        self._metrics, self._outbox = Metrics(), list[SequenceOutput]()
        # Also when nobody calls `close`: threads and files would outlive the engine.
        self._close_tiers = weakref.finalize(self, _close, tiers, workers)
        self.workers = workers
        self._cost = tiers.cost if tiers is not None else MeasuredCost(1)
        self._eviction = per_tier("eviction_policy", config)
        self.cache = TieredCache(
            info.num_gpu_blocks,
            info.block_size,
            make_policy("eviction", "eviction_policy", self._eviction[TierName.GPU]),
            clock,
            fingerprint=info.fingerprint,
            enable_prefix_caching=config.enable_prefix_caching,
            window=info.window,
            tiers=tiers.specs if tiers is not None else (),
            mover=tiers.mover if tiers is not None else None,
            slot_bytes=tiers.slot_bytes if tiers is not None else 1,
            limits=tiers.limits if tiers is not None else None,
            cost=self._cost,
        )
        if tiers is not None and tiers.stored:
            recover(self.cache, tiers.stored)
        self.scheduler = Scheduler(
            self.cache,
            make_policy("order", "scheduling_policy", config.scheduling_policy),
            scheduling_policies(config, self._cost),
            clock,
            self._metrics,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        is_overlapped = bool(config.async_scheduling)
        self.steps = Steps(
            executor, sampler, self.scheduler, clock, self._cost, is_overlapped=is_overlapped
        )
        self.control = KvControl(
            self.cache, self.scheduler, info, clock, port, self._eviction_of, self.settle
        )
        self.control.set_pin_budget(config.pin_budget)
        self._stepped: dict[int, Sequence] = {}
        self._failure: BaseException | None = None

    @classmethod
    def from_config(cls, config: EngineConfig) -> EngineCore:
        """Load the model that the config names and build an engine around it."""
        from tierkv.engine.build import build_engine  # torch enters here

        return build_engine(config)

    # ------------------------------------------------------------------ the step

    @property
    def has_work(self) -> bool:
        is_working = self.steps.is_busy or self.scheduler.has_work
        return bool(self._outbox) or (self.control.is_awake and is_working)

    def step(self) -> list[SequenceOutput]:
        """Plan, run, sample, commit; returns news of every sequence that has any.

        With overlapped steps the news are those of the step before.

        Raises:
            EngineDeadError: an earlier step failed half-way, so that what was planned and what was
                computed no longer agree.
        """
        if self._failure is not None:
            raise EngineDeadError(f"an earlier step failed: {self._failure!r}")
        return self._attempt(self._step)

    def _attempt(self, work: Callable[[], list[SequenceOutput]]) -> list[SequenceOutput]:
        try:
            return work()
        except BaseException as error:
            self._failure = error
            raise

    def _step(self) -> list[SequenceOutput]:
        if not self.control.is_awake:
            return self._rest()
        self.cache.poll()
        if self.cache.moves is not None:
            self._cost.note_moves(self.cache.moves.stats)
        if self.steps.is_busy and self.scheduler.preemptor.is_due:
            self.settle()
        plan = self.scheduler.plan()
        self.cache.begin(plan.moves)
        outputs: list[SequenceOutput] = []
        if not plan.is_empty or self.steps.is_busy:
            outputs = self.steps.advance(plan)
        elif self.cache.has_moves and not self._outbox:
            self.cache.wait(_WAIT_S)
        self._forget_finished()
        outputs, self._outbox = self._outbox + outputs, []
        return outputs

    def _rest(self) -> list[SequenceOutput]:
        self.work_in_background()
        self._forget_finished()
        outputs, self._outbox = self._outbox, []
        return outputs

    def settle(self) -> None:
        """Wait for the step under way, if there is one; its news come with the next step."""
        if self._failure is None:
            self._outbox += self._attempt(self.steps.settle)
            self._forget_finished()

    @property
    def has_background_work(self) -> bool:
        """Moves or offers are left that `work_in_background` would advance."""
        is_waiting = self.control.is_falling_asleep or self.cache.keeps.has_unsettled
        return is_waiting or self.cache.has_background_work

    def work_in_background(self) -> None:
        """Advance moves while there is no request; does not wait."""
        self.cache.poll()
        self.cache.write_back()
        self.cache.begin(self.cache.take_moves())
        self.control.sleeper.advance()

    def _forget_finished(self) -> None:
        for seq in self.scheduler.take_finished():
            self.steps.forget(seq.seq_id)
            self._stepped.pop(seq.seq_id, None)
            if seq.hints is not None:
                self.control.ended(seq)

    # ------------------------------------------------------------------ requests

    def add_request(self, request: EngineRequest, grammar: Grammar | None = None) -> None:
        """Check and queue a request. Compiles its grammar, if it needs one and none is given.

        Raises:
            RequestError: bad prompt, grammar or id; CapacityError: it could never fit;
                EngineDeadError: the engine was closed.
        """
        if not self._close_tiers.alive:
            raise EngineDeadError("the engine was closed: make a new one")
        self._check_prompt(request.prompt_token_ids)
        live = Request(
            request.request_id,
            request.prompt_token_ids,
            request.params,
            max_tokens=self._max_tokens(request),
            arrival_s=self._clock.now(),
            priority=request.priority,
            cache_salt=request.cache_salt,
            eos_token_ids=frozenset(self.info.eos_token_ids),
            is_stepped=request.is_stepped,
            grammar=grammar or self._grammar(request.params),
            tenant=request.tenant,
            hints=request.hints,
        )
        self.scheduler.add(live)
        self.control.admit(live)
        if request.is_stepped:
            self._stepped[live.sequences[0].seq_id] = live.sequences[0]

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("prompt", "", "must hold at least one token")
        limit = self.info.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= limit:
            bad = next(t for t in token_ids if not 0 <= t < limit)
            raise RequestError("prompt_token_ids", bad, f"token ids must be in [0, {limit})")
        if len(token_ids) >= self.info.max_model_len:
            raise RequestError(
                "prompt",
                f"<{len(token_ids)} tokens>",
                f"must leave room for output within max_model_len={self.info.max_model_len}: "
                "shorten it or raise max_model_len",
            )

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        wanted = params.structured_outputs
        if wanted is None:
            return None
        if self.grammars is None:
            raise RequestError("structured_outputs", wanted, "is not served by this engine")
        return self.grammars.compile(wanted)

    def _max_tokens(self, request: EngineRequest) -> int:
        room = self.info.max_model_len - len(request.prompt_token_ids)
        asked = request.params.max_tokens
        return room if asked is None else min(asked, room)

    def abort(self, request_ids: list[str]) -> None:
        """End requests now; blocks are free on return, outputs follow with the next step."""
        gone = set(request_ids)  # what waits to be said of them is not, but that a sequence ended
        self._outbox = [o for o in self._outbox if o.finish_reason or o.request_id not in gone]
        for request_id in request_ids:
            for seq in self.scheduler.finish_request(request_id, FinishReason.ABORT):
                self._outbox.append(self.scheduler.final_output(seq))
        self._forget_finished()

    def stop_sequence(self, request_id: str, index: int) -> None:
        """The front end saw a stop string: end that sequence, without further output."""
        request = self.scheduler.requests.get(request_id)
        for seq in request.sequences if request else []:
            if seq.index == index and seq.state is not SeqState.FINISHED:
                self.scheduler.finish_sequence(seq, FinishReason.STOP)
        stopped = request_id, index
        self._outbox = [o for o in self._outbox if (o.request_id, o.index) != stopped]
        self._forget_finished()

    # ------------------------------------------------------------------ stepped requests

    def advance(self, seq_id: int, token_id: int) -> None:
        """Continue a stepped sequence with the caller's token."""
        self.scheduler.advance(self._stepped_sequence(seq_id), token_id)

    def fork(self, seq_id: int, token_id: int) -> int:
        """A new sequence that shares all blocks of `seq_id` and continues with `token_id`."""
        child = self.scheduler.fork(self._stepped_sequence(seq_id), token_id)
        self._stepped[child.seq_id] = child
        return child.seq_id

    def drop(self, seq_id: int) -> None:
        """End one sequence of a stepped request."""
        self.scheduler.finish_sequence(self._stepped_sequence(seq_id), FinishReason.STOP)
        self._forget_finished()

    def _eviction_of(self, tier: TierName) -> EvictionPolicy:
        """One more policy of the tier's kind."""
        made: EvictionPolicy = make_policy("eviction", "eviction_policy", self._eviction[tier])
        return made

    def _stepped_sequence(self, seq_id: int) -> Sequence:
        if seq_id not in self._stepped:
            raise RequestError("seq_id", seq_id, "is not a live sequence of a stepped request")
        return self._stepped[seq_id]

    # ------------------------------------------------------------------ state

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks in all tiers, for good.

        False, and nothing happens, while sequences hold blocks or a move does not end. False too
        when a disk did not confirm in time that it has erased what was on it: this process has
        forgotten all, the next one may find some. The log says why; erasing goes on.
        """
        self.settle()
        if self.scheduler.holders:
            return False
        if self.cache.lower is not None:
            self.cache.lower.clear_offers()
        self._wait_for_moves(_RESET_S)
        return forget_all(self.cache) and self._is_erased(_RESET_S)

    def _is_erased(self, timeout_s: float) -> bool:
        """Whether all that was forgotten is gone from disk; what failed is tried once more."""
        erasures = self.cache.moves.erasures if self.cache.moves is not None else None
        if erasures is None or not erasures.num_open:
            return True
        erasures.retry()
        end = time.monotonic() + timeout_s
        while erasures.num_begun and time.monotonic() < end:
            self.cache.wait(_WAIT_S)
            self.cache.poll()
        if failure := erasures.failure():
            logger.warning("the prefix cache was reset, but on disk %s", failure)
        return not erasures.num_open

    def flush(self, timeout_s: float) -> bool:
        """Let everything that is on its way to a lower tier arrive; whether it did in time."""
        return self._wait_for_moves(timeout_s)

    def _wait_for_moves(self, timeout_s: float) -> bool:
        self.settle()
        end = time.monotonic() + timeout_s
        while self.cache.has_background_work:
            self.work_in_background()
            if time.monotonic() > end:
                return False
            self.cache.wait(_WAIT_S)
        return True

    def check(self) -> None:
        """Verify every conservation law; for tests and for idle moments."""
        check_cache(self.cache, self.scheduler.holders)

    def metrics(self) -> dict[str, Any]:
        """Counters since the start, and gauges of now, as a plain dict."""
        return self._metrics.as_dict() | {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            **tier_metrics(self.cache, self._eviction),
        }

    def close(self) -> None:
        """End all requests, let what is on its way down arrive, and let the model go."""
        try:
            self.abort(list(self.scheduler.requests))
            self.settle()
            self._outbox.clear()
            is_sound = self.workers is None or self.workers.is_alive
            if self._failure is None and self._close_tiers.alive and is_sound:
                self.flush(_CLOSE_S)
                self._is_erased(_CLOSE_S)
        finally:
            self._close_tiers()
            if self.grammars is not None:
                self.grammars.close()


def _close(tiers: LowerTierSetup | None, workers: Workers | None) -> None:
    """Let go of the tiers, and then of the processes that have some of their own."""
    try:
        if tiers is not None:
            tiers.close()
    finally:
        if workers is not None:
            workers.close()
