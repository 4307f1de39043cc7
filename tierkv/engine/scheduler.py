"""The scheduler: who computes what in the next step. It touches no tensor and no file.

`plan` makes room first (preempting if it must), then gives every decoding sequence its token,
then continues prompts in chunks, then admits waiting sequences; all under one token budget.
`commit` takes the sampled tokens, seals full blocks, and ends or forks sequences. `plan` only
advances counts, so `commit` of one step may follow `plan` of the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from tierkv.cache.copies import CopyBatch
from tierkv.cache.shares import HeldBlocks
from tierkv.cache.tiered_cache import Lookup, Match, TieredCache
from tierkv.engine import results
from tierkv.engine.capacity import check_capacity, check_parallel
from tierkv.engine.loading import Loader
from tierkv.engine.outputs import SequenceOutput
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.preemption import Preemptor, SchedulingPolicies
from tierkv.engine.request import Request, SeqState, Sequence
from tierkv.engine.timeline import Timeline
from tierkv.engine.waiting import WaitingQueue
from tierkv.errors import InvariantError, RequestError
from tierkv.metrics import Metrics
from tierkv.policies.order import OrderPolicy
from tierkv.protocols import Clock
from tierkv.types import FinishReason, RowResult, SampledToken

_WATERMARK = 0.01  # share of the pool left free when admitting beside running sequences


class Scheduler:
    """Continuous batching with chunked prefill over a `TieredCache`.

    Args:
        cache: owns blocks; the scheduler is its only user.
        order: admission order of waiting sequences.
        policies: whom to preempt and how, what to load and what to prefetch.
        clock: engine time.
        metrics: counters to keep.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens in one step.
    """

    def __init__(
        self,
        cache: TieredCache,
        order: OrderPolicy,
        policies: SchedulingPolicies,
        clock: Clock,
        metrics: Metrics,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
    ) -> None:
        self.cache = cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.metrics = metrics
        self.running: dict[int, Sequence] = {}
        self.loading: dict[int, Sequence] = {}
        self.waiting = WaitingQueue(order, lambda seq: cache.lookup(seq).num_tokens)
        self.requests: dict[str, Request] = {}
        self.timeline = Timeline(clock)
        self.preemptor = Preemptor(cache, self.running, self.waiting, policies, clock, metrics)
        self._loader = Loader(cache, policies, clock, metrics)
        self._clock = clock
        self._seq_ids = itertools.count()
        self._admissions = itertools.count(1)
        self._finished: list[Sequence] = []
        self._copies = CopyBatch()  # of the last plan
        self._num_in_flight = 0
        self._reserve = int(cache.num_blocks * _WATERMARK)
        self._refused: tuple[Sequence, int] | None = None  # since the last admission; its need

    # ------------------------------------------------------------------ requests

    @property
    def has_work(self) -> bool:
        """Something could be planned now or once another sequence or a move gets on."""
        return (
            bool(self.loading)
            or any(not seq.is_paused for seq in self.waiting)
            or any(seq.num_to_compute or seq.num_inflight for seq in self.running.values())
        )

    @property
    def holders(self) -> list[Sequence]:
        """All sequences that hold blocks."""
        return [*self.running.values(), *self.loading.values()]

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: its id is in use, or `n` exceeds `max_num_seqs`.
            CapacityError: it could not even run alone; says how much it needs.
        """
        if request.request_id in self.requests:
            raise RequestError("request_id", request.request_id, "is in use by a live request")
        check_parallel("n", request.params.n, self.max_num_seqs)
        check_capacity(request, self.cache, self.max_num_batched_tokens)
        seq = Sequence(next(self._seq_ids), request, 0, list(request.prompt_token_ids))
        request.sequences.append(seq)
        self.requests[request.request_id] = request
        self.timeline.add(seq)
        self.waiting.add(seq)

    def finish_request(self, request_id: str, reason: FinishReason) -> list[Sequence]:
        """End all live sequences of a request at once; returns them. Unknown ids end nothing."""
        request = self.requests.get(request_id)
        live = [s for s in request.sequences if s.state is not SeqState.FINISHED] if request else []
        for seq in live:
            self.finish_sequence(seq, reason)
        return live

    def finish_sequence(self, seq: Sequence, reason: FinishReason) -> None:
        """End one sequence and free what it holds."""
        self.running.pop(seq.seq_id, None)
        self.loading.pop(seq.seq_id, None)
        self.cache.release(seq)
        seq.finish_reason = reason
        seq.move_to(SeqState.FINISHED)
        self._finished.append(seq)
        self.metrics.sequence_finished(reason)
        request = seq.request
        if request.is_finished:
            del self.requests[request.request_id]
            self.timeline.end(request)

    def take_finished(self) -> list[Sequence]:
        """Sequences that ended since the last call, for others to forget."""
        finished, self._finished = self._finished, []
        return finished

    def stop_all(self) -> None:
        """Nothing holds blocks any more; to be called between two steps."""
        self.preemptor.stop_all(self.loading)

    # ------------------------------------------------------------------ plan

    def plan(self) -> Plan:
        """Decide the next step; advances the counts of every sequence in it."""
        plan = Plan()
        self.cache.write_back()
        self.preemptor.finish_swaps()
        self._start_loaded()
        self._loader.note_ended(self.running)
        self.preemptor.take_turns()
        self.preemptor.make_room()
        prefills = self._plan_decodes(plan)
        for seq in prefills:
            self._plan_chunk(plan, seq)
        self._admit(plan)
        if self.cache.prefetcher is not None:
            if self.waiting:
                self._loader.prefetch(self.waiting, self._num_spare())
            else:
                self.cache.prefetcher.forget()
        if plan.is_empty and not self._num_in_flight and not self.cache.has_moves:
            self.preemptor.end_standstill()
        self._num_in_flight += 0 if plan.is_empty else 1
        self._copies = self.cache.copies.take()
        plan.copies = self._copies.copies
        if plan.copies and plan.is_empty:
            raise InvariantError("blocks are to be copied by a step that will not run")
        plan.moves = self.cache.take_moves()
        return plan

    def _start_loaded(self) -> None:
        """LOADING -> RUNNING for sequences that wait for nothing any more."""
        for seq in [seq for seq in self.loading.values() if not seq.num_loading]:
            del self.loading[seq.seq_id]
            self.cache.skip_loaded(seq)
            self._correct_hits(seq)
            self._start(seq)

    def _correct_hits(self, seq: Sequence) -> None:
        """A load that failed was counted as a hit when the request was admitted."""
        request = seq.request
        cached = request.num_cached_tokens or 0
        reused = seq.num_computed - request.num_head_tokens
        if not seq.num_generated and not request.num_preemptions and reused < cached:
            self.metrics.hit_tokens -= cached - reused
            request.num_cached_tokens = reused
            self._loader.take_back(request, cached - reused)

    def _start(self, seq: Sequence) -> None:
        seq.move_to(SeqState.RUNNING)
        seq.scheduled_order = next(self._admissions)
        seq.admitted_tokens = seq.num_tokens
        self.running[seq.seq_id] = seq

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """A row for each sequence with one token to compute; returns those with more."""
        prefills: list[Sequence] = []
        cache = self.cache
        for seq in self.running.values():
            start = seq.num_computed
            remaining = seq.num_to_compute
            if remaining > 1:
                if not seq.load_tokens or cache.skip_loaded(seq):
                    prefills.append(seq)
            elif remaining == 1 and plan.num_tokens < self.max_num_batched_tokens:
                need = cache.blocks_to_grow(seq, start + 1)
                if need > cache.num_available:
                    continue  # a step in flight still holds what this one waits for
                if need:
                    cache.grow(seq, start + 1)
                self._add_row(plan, seq, 1)
        return prefills

    def _plan_chunk(self, plan: Plan, seq: Sequence) -> None:
        """As much of the prompt as budget and pool allow; maybe nothing."""
        budget = self.max_num_batched_tokens - plan.num_tokens
        end = seq.num_tokens if not seq.load_tokens else seq.load_from * self.cache.block_size
        size = self._fit_chunk(seq, min(end - seq.num_computed, budget))
        if size > 0:
            self.cache.grow(seq, seq.num_computed + size)
            self._add_row(plan, seq, size)

    def _fit_chunk(self, seq: Sequence, size: int) -> int:
        """The largest chunk of at most `size` tokens for which there are blocks."""
        if size <= 0 or self.cache.blocks_to_grow(seq, seq.num_computed + 1) > (
            self.cache.num_available
        ):
            return 0
        missing = self.cache.blocks_to_grow(seq, seq.num_computed + size)
        missing -= self.cache.num_available
        if missing <= 0:
            return size
        end = (self.cache.blocks_for(seq.num_computed + size) - missing) * self.cache.block_size
        return max(0, end - seq.num_computed)

    def _add_row(self, plan: Plan, seq: Sequence, size: int) -> None:
        request, start = seq.request, seq.num_computed
        ends = start + size == len(seq.token_ids) + seq.num_inflight
        num_samples = 0
        if ends:
            num_samples = request.params.n if self._forks_next(seq) else 1
            seq.num_inflight += 0 if request.is_stepped else 1
            seq.is_paused = request.is_stepped
        num_logit_rows = 1 if ends else 0
        if request.params.prompt_logprobs is not None and (
            request.num_prompt_logprobs < min(start + size, seq.num_prompt_tokens - 1)
        ):
            num_logit_rows = size
        plan.rows.append(PlanRow(seq, start, size, num_samples, num_logit_rows))
        plan.num_tokens += size
        seq.num_computed = start + size
        seq.num_uncommitted += 1

    def _forks_next(self, seq: Sequence) -> bool:
        request = seq.request
        return (
            request.params.n > 1
            and len(request.sequences) == 1
            and (seq.num_tokens == seq.num_prompt_tokens)
        )

    # ------------------------------------------------------------------ admit

    def _admit(self, plan: Plan) -> None:
        """Admit waiting sequences in order until one does not fit."""
        self.waiting.drop_departed()
        if not self.waiting or len(self.running) + len(self.loading) >= self.max_num_seqs:
            return
        self.waiting.rank_again()
        slots = self.max_num_seqs - self._num_promised()
        held = HeldBlocks(self.holders)
        for seq in self.waiting:
            if plan.num_tokens >= self.max_num_batched_tokens or slots < self._num_future(seq):
                break
            if not self._is_admissible(seq, held):
                continue
            if self._is_refused(seq):
                break
            match = self.cache.lookup(seq, use_cache=seq.request.params.prompt_logprobs is None)
            if match.next is Lookup.PENDING:
                seq.waits_for = seq.block_keys[len(match.blocks)]
                pending = self.cache.claims.num_pending(seq, len(match.blocks))
                self.metrics.pending_tokens += pending * self.cache.block_size
                continue
            if not self._try_admit(seq, match):
                break
            slots -= self._num_future(seq)
            if seq.state is SeqState.RUNNING:
                self._plan_chunk(plan, seq)
            held.add(seq)
        self.waiting.drop_departed()

    def _is_refused(self, seq: Sequence) -> bool:
        """Whether there was no room for it, and there cannot be: only an admission lessens what a
        sequence needs."""
        refused = self._refused
        if refused is None or refused[0] is not seq or refused[1] <= self._num_spare():
            return False
        self.preemptor.is_turn_wanted = True
        return True

    def _is_admissible(self, seq: Sequence, held: HeldBlocks) -> bool:
        """Not undecided, and not waiting for a block that another is still computing."""
        if seq.is_paused or seq.num_inflight or seq.state is SeqState.SWAPPING:
            return False
        if not held.admits(seq.owner, self.cache.blocks_for(seq.num_tokens)):
            return False
        return seq.waits_for is None or not self.cache.claims.is_claimed(seq, seq.waits_for)

    def _num_promised(self) -> int:
        """Running sequences, counting parallel samples that are still to be forked."""
        return sum(self._num_future(seq) for seq in self.holders)

    def _num_future(self, seq: Sequence) -> int:
        return seq.request.params.n if self._forks_next(seq) else 1

    def _num_spare(self) -> int:
        """Blocks that nobody who runs will ask for soon."""
        if not self.running and not self.loading:
            return self.cache.num_available
        return self.cache.num_available - self._outstanding() - self._reserve

    def _try_admit(self, seq: Sequence, match: Match) -> bool:
        """Acquire the match if the whole sequence fits beside what running prompts still need."""
        tokens, chunk, spare = seq.num_tokens, self.max_num_batched_tokens, self._num_spare()
        match, num_head = self._loader.choose(seq, match)
        need = self.cache.blocks_to_acquire(match, tokens, chunk)
        if need > spare and match.partial is not None:
            match = Match(match.blocks, 0, len(match.blocks) * self.cache.block_size)
            need = self.cache.blocks_to_acquire(match, tokens, chunk)
        if need > spare:
            self._refused, self.preemptor.is_turn_wanted = (seq, need), True
            return False
        self._refused = None
        self._loader.note_hits(seq, match, num_head)
        self.cache.acquire(seq, match, num_head)
        self._loader.note_begun(seq)
        self._note_admission(seq, match)
        if seq.num_loading and seq.num_computed >= seq.load_from * self.cache.block_size:
            seq.move_to(SeqState.LOADING)
            self.loading[seq.seq_id] = seq
            return True
        if seq.state is SeqState.SWAPPED:
            seq.move_to(SeqState.LOADING)  # it found everything in the pool
        self._start(seq)
        return True

    def _outstanding(self) -> int:
        """Blocks that running prompts will still ask for."""
        return sum(
            self.cache.blocks_to_grow(seq, seq.num_tokens)
            for seq in self.holders
            if seq.num_to_compute
        )

    def _note_admission(self, seq: Sequence, match: Match) -> None:
        request = seq.request
        cached = max(match.num_tokens, len(match.blocks) * self.cache.block_size, seq.load_tokens)
        if request.first_scheduled_s is None:
            request.first_scheduled_s = self._clock.now()
            reused = min(cached, seq.num_prompt_tokens) - request.num_head_tokens
            request.num_cached_tokens = reused
            if (sources := request.prompt_sources) is not None:
                sources.gpu = reused - sources.cpu - sources.nvme
            self.metrics.queried_tokens += seq.num_prompt_tokens
            self.metrics.hit_tokens += request.num_cached_tokens
            if self.waiting.service is not None:
                missed = seq.num_prompt_tokens - request.num_cached_tokens
                self.waiting.service.admitted(request.tenant, missed)
        else:
            self.metrics.recomputed_tokens += seq.num_tokens - cached

    # ------------------------------------------------------------------ commit

    def note_launched(self) -> None:
        """The executor has the last plan: whatever comes now comes after its copies."""
        self.cache.copies.finish(self._copies)

    def commit(self, plan: Plan, rows: Iterable[RowResult]) -> list[SequenceOutput]:
        """Take the step's tokens; returns news for every sequence that has any."""
        self._num_in_flight -= 1
        outputs: list[SequenceOutput] = []
        block_size, window = self.cache.block_size, self.cache.window
        for row, result in zip(plan.rows, rows, strict=True):
            seq = row.seq
            seq.num_uncommitted -= 1
            if seq.state is SeqState.FINISHED:
                continue
            end = row.start + row.num_tokens
            if row.epoch == seq.epoch and (
                end // block_size > seq.num_sealed or window is not None
            ):
                self.cache.seal(seq, end)
            samples = result.samples
            if len(samples) == 1 and not result.prompt_logprobs and seq.num_inflight:
                seq.num_inflight -= 1
                outputs.append(self._append(seq, samples[0]))
            elif samples or result.prompt_logprobs:
                outputs.extend(self._commit_row(seq, row, result))
        if self.waiting.service is not None:
            tenants = (row.seq.request.tenant for row in plan.rows for _ in range(row.num_samples))
            self.waiting.service.generated(tenants)
        self.metrics.steps += 1
        self.metrics.computed_tokens += plan.num_tokens
        return outputs

    def _commit_row(self, seq: Sequence, row: PlanRow, result: RowResult) -> list[SequenceOutput]:
        if seq.request.is_stepped and result.samples:
            return [results.candidates(seq, result)]
        prompt_logprobs = results.fresh_prompt_logprobs(row, result)
        if not result.samples:
            output = results.news(seq, [])
            output.prompt_logprobs = prompt_logprobs
            return [output]
        computed = row.start + row.num_tokens if row.epoch == seq.epoch else 0
        children = [self._fork(seq, computed) for _ in result.samples[1:]]
        seq.num_inflight -= 1
        outputs = [self._append(seq, result.samples[0])]
        outputs.extend(
            self._append(child, sample)
            for child, sample in zip(children, result.samples[1:], strict=True)
        )
        outputs[0].prompt_logprobs = prompt_logprobs or None
        return outputs

    def _append(self, seq: Sequence, sample: SampledToken) -> SequenceOutput:
        token, request, token_ids = sample.token_id, seq.request, seq.token_ids
        token_ids.append(token)
        logprobs = [sample.logprobs] if sample.logprobs is not None else None
        output = results.news(seq, [token], logprobs)
        self.metrics.generated_tokens += 1
        generated = len(token_ids) - seq.num_prompt_tokens
        if request.first_token_s is None:
            request.first_token_s = self._clock.now()
            output.metrics = results.times(request)
        if sample.ending is not None:
            self._finish_with(seq, sample.ending, output)
        elif token in request.stop_token_ids and generated >= request.params.min_tokens:
            seq.stop_reason = None if token in request.eos_token_ids else token
            self._finish_with(seq, FinishReason.STOP, output)
        elif generated >= request.max_tokens:
            self._finish_with(seq, FinishReason.LENGTH, output)
        return output

    def _finish_with(self, seq: Sequence, reason: FinishReason, output: SequenceOutput) -> None:
        self.finish_sequence(seq, reason)
        results.final_news(output, seq, self._clock.now())

    def final_output(self, seq: Sequence) -> SequenceOutput:
        """The last word on a sequence that was ended from outside."""
        return results.final_news(results.news(seq, []), seq, self._clock.now())

    # ------------------------------------------------------------------ fork

    def _fork(self, seq: Sequence, num_computed: int) -> Sequence:
        """A sequence with the same tokens that shares the KV of the first `num_computed`."""
        request = seq.request
        child = Sequence(next(self._seq_ids), request, len(request.sequences), list(seq.token_ids))
        request.sequences.append(child)
        self.timeline.add(child)
        if num_computed and seq.state is SeqState.RUNNING:
            self.cache.fork(seq, child, num_computed)
            self._start(child)
        else:
            self.waiting.add(child)
        return child

    def fork(self, seq: Sequence, token_id: int) -> Sequence:
        """A new sequence of a stepped request: `seq`'s tokens, then `token_id`.

        Raises:
            RequestError: the sequence is not waiting for a decision, or too many would run.
        """
        self._require_paused(seq)
        live = sum(s.state is not SeqState.FINISHED for s in seq.request.sequences)
        check_parallel("beam_width", live + 1, self.max_num_seqs)
        child = self._fork(seq, seq.num_computed)
        child.token_ids.append(token_id)
        return child

    def advance(self, seq: Sequence, token_id: int) -> None:
        """Continue a stepped sequence by `token_id`."""
        self._require_paused(seq)
        seq.token_ids.append(token_id)
        seq.is_paused = False

    def _require_paused(self, seq: Sequence) -> None:
        if not seq.is_paused or seq.state is SeqState.FINISHED:
            raise RequestError("seq_id", seq.seq_id, "is not waiting for its next token")
