"""`LLM`: the engine inside the caller's process, in vLLM's shape."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from tierkv.config import EngineConfig
from tierkv.engine.beam import BeamSearch, BeamSearchOutput, BeamSearchParams
from tierkv.engine.capacity import check_parallel
from tierkv.engine.core import EngineCore
from tierkv.engine.inputs import (
    InputProcessor,
    ParsedPrompt,
    Prompt,
    parse_conversations,
    parse_params,
    parse_prompt,
    parse_prompts,
)
from tierkv.engine.kv_hints import Hints, parse_each
from tierkv.engine.output_processor import OutputProcessor, RequestState
from tierkv.engine.outputs import RequestOutput, SequenceOutput
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tokenizer import load_tokenizer
from tierkv.errors import InvariantError, RequestError

_PAUSE_S = 0.005  # between two looks at what goes down


class LLM:
    """A model ready to generate. Not thread-safe: use it from one thread at a time.

    Args:
        model: the built-in `demo`, a Hugging Face directory, or a hub id.
        options: fields of `EngineConfig`.

    Raises:
        ConfigError: an option is unknown or wrong; names it, its value and the fix.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        config = EngineConfig.from_mapping({"model": model, **options})
        self._engine = EngineCore.from_config(config)
        self.info = self._engine.info
        self._tokenizer = load_tokenizer(
            self.info.tokenizer,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
        self._inputs = InputProcessor(self._tokenizer, self.info)
        self._outputs = OutputProcessor(self._tokenizer)
        self._ids = (f"request-{i}" for i in itertools.count())

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | list[int] | None = None,
        kv_hints: Hints | list[Hints] = None,
    ) -> list[RequestOutput]:
        """Complete all prompts; one output for each, in order.

        A bad prompt or parameter raises before any of them runs. An interrupt (Ctrl-C) aborts
        them all and leaves the engine usable.

        Args:
            prompts: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}` (with an
                optional `"cache_salt"`), or a list of these.
            sampling_params: for all, or one for each; default `SamplingParams()`.
            use_tqdm: show a progress bar.
            priority: lower runs first under `scheduling_policy="priority"`; for all, or each.
            kv_hints: what requests say of their own KV (`KvHints`, or a mapping of its fields);
                for all, or each.

        Raises:
            RequestError: naming the field, the value and the fix.
        """
        parsed = parse_prompts(prompts)
        params = parse_params(sampling_params, len(parsed))
        for prompt, hints in zip(parsed, parse_each(kv_hints, len(parsed)), strict=True):
            prompt.hints = hints
        return self._run(parsed, params, _priorities(priority, len(parsed)), use_tqdm)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list, using the tokenizer's chat template."""
        options = {"add_generation_prompt": add_generation_prompt, "chat_template": chat_template}
        parsed = [self._inputs.chat_prompt(c, **options) for c in parse_conversations(messages)]
        params = parse_params(sampling_params, len(parsed))
        return self._run(parsed, params, [0] * len(parsed), use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """The growing output of one prompt, after each token; closing the iterator aborts it.

        Other requests (other streams, `generate`) may run between two items.
        """
        parsed = parse_prompt(prompt)
        params = parse_params(sampling_params, 1)
        (state,) = self._submit([parsed], params, [priority])
        return _Stream(state, self._step, self._discard)

    def beam_search(
        self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The `beam_width` most likely continuations of each prompt, best first.

        Raises:
            RequestError: a bad prompt, or more beams than run at once; nothing has run then.
        """
        check_parallel("beam_width", params.beam_width, self._engine.scheduler.max_num_seqs)
        searches: dict[str, BeamSearch] = {}
        eos = frozenset(self.info.eos_token_ids)
        try:
            for parsed in parse_prompts(prompts):
                request_id, ids = next(self._ids), self._inputs.tokenize(parsed)
                search = BeamSearch(request_id, parsed.text, ids, params, eos, parsed.cache_salt)
                self._engine.add_request(search.request)
                searches[request_id] = search
            self._run_beams(searches)
        except BaseException:
            self._engine.abort(list(searches))
            raise
        return [search.output(self._tokenizer) for search in searches.values()]

    def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests now; their streams deliver one more output, with reason "abort"."""
        self._engine.abort([request_id] if isinstance(request_id, str) else list(request_id))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks, on disk too. False, and nothing happens, while requests hold
        blocks; False, and the log says why, when a disk has not confirmed it."""
        return self._engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Give the pool's memory back to the system; its KV goes to the tiers below, if there are
        any. Weights stay. Requests wait until `wake_up`, and then go on.

        Raises:
            RequestError: another level than 1, which would drop weights too.
        """
        if level != 1:
            raise RequestError("level", level, "must be 1: weights stay where they are")
        self._engine.control.sleep()
        while self._engine.control.is_falling_asleep:
            self._engine.work_in_background()
            self._engine.cache.wait(_PAUSE_S)

    def wake_up(self) -> None:
        """Go on with what waits."""
        self._engine.control.wake()

    def metrics(self) -> dict[str, Any]:
        """Counters since the start and gauges of now, by name."""
        return self._engine.metrics()

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None for a model without one."""
        return self._tokenizer.hf if self._tokenizer is not None else None

    def close(self) -> None:
        """End all requests and let the model go; closing twice is harmless."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- how it runs ---------------------------------------------------------------------------

    def _run(
        self,
        prompts: list[ParsedPrompt],
        params: list[SamplingParams],
        priorities: list[int],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        states = self._submit(prompts, params, priorities)
        waiting = {state.request_id for state in states}
        try:
            with _progress(len(states), use_tqdm) as show, deferred_interrupt() as check:
                while waiting:
                    ended = [s for s in self._step() if s.is_finished and s.request_id in waiting]
                    waiting.difference_update(state.request_id for state in ended)
                    show(ended)
                    check()
        except BaseException:
            self._discard(states)
            raise
        return [state.output() for state in states]

    def _submit(
        self, prompts: list[ParsedPrompt], params: list[SamplingParams], priorities: list[int]
    ) -> list[RequestState]:
        """Queue all of them or, when one is refused, none."""
        requests = [
            self._inputs.request(next(self._ids), prompt, p, priority)
            for prompt, p, priority in zip(prompts, params, priorities, strict=True)
        ]
        states: list[RequestState] = []
        try:
            for request, prompt in zip(requests, prompts, strict=True):
                states.append(self._outputs.add(request, prompt.text))
                self._engine.add_request(request)
        except BaseException:
            self._discard(states)
            raise
        return states

    def _discard(self, states: list[RequestState]) -> None:
        self._engine.abort([state.request_id for state in states if not state.is_finished])
        for state in states:
            self._outputs.forget(state.request_id)

    def _step(self) -> list[RequestState]:
        """One step of the engine for all requests in flight; returns those with news."""
        return self._route(self._run_engine())

    def _run_engine(self) -> list[SequenceOutput]:
        if not self._engine.control.is_awake:
            raise RequestError("prompt", "<request>", "the engine is asleep: call wake_up() first")
        if not self._engine.has_work:
            raise InvariantError("the engine is idle while requests wait for it")
        return self._engine.step()

    def _route(self, outputs: list[SequenceOutput]) -> list[RequestState]:
        changed, stops = self._outputs.process(outputs)
        for stop in stops:
            self._engine.stop_sequence(stop.request_id, stop.index)
        return changed

    def _run_beams(self, searches: dict[str, BeamSearch]) -> None:
        with deferred_interrupt() as check:
            while not all(search.is_finished for search in searches.values()):
                outputs = self._run_engine()
                self._route(outputs)  # of other requests in flight
                for output in outputs:
                    if output.request_id in searches:
                        searches[output.request_id].update(output)
                for search in searches.values():
                    search.proceed(self._engine)
                check()


class _Stream(Iterator[RequestOutput]):
    """The outputs of one request, one for each step that brought news."""

    def __init__(
        self,
        state: RequestState,
        step: Callable[[], object],
        discard: Callable[[list[RequestState]], None],
    ) -> None:
        self._state, self._step, self._discard = state, step, discard
        self._num_seen = 0
        self._is_open = True

    def __next__(self) -> RequestOutput:
        if not self._is_open:
            raise StopIteration
        try:
            with deferred_interrupt():
                while self._state.num_updates == self._num_seen:
                    self._step()
        except BaseException:
            self.close()
            raise
        self._num_seen = self._state.num_updates
        self._is_open = not self._state.is_finished
        return self._state.output()

    def close(self) -> None:
        """Abort the request unless it has finished."""
        if self._is_open:
            self._is_open = False
            self._discard([self._state])

    def __del__(self) -> None:
        self.close()


def _priorities(priority: int | list[int] | None, count: int) -> list[int]:
    if priority is None or isinstance(priority, int):
        return [priority or 0] * count
    if len(priority) != count:
        fix = f"{len(priority)} were given for {count} prompts: give one for all, or one for each"
        raise RequestError("priority", priority, fix)
    return list(priority)


@contextmanager
def _progress(total: int, is_shown: bool) -> Iterator[Callable[[list[RequestState]], None]]:
    """A bar over requests with the rate of generated tokens; call it with those that ended."""
    with tqdm(total=total, desc="Requests", disable=not is_shown, dynamic_ncols=True) as bar:
        num_tokens = 0

        def show(ended: list[RequestState]) -> None:
            nonlocal num_tokens
            if ended and is_shown:
                num_tokens += sum(len(seq.token_ids) for s in ended for seq in s.sequences)
                elapsed_s = max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{num_tokens / elapsed_s:.1f} tok/s", refresh=False)
                bar.update(len(ended))

        yield show


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C takes effect at the next call of what this yields, or at the end.

    A KeyboardInterrupt in the middle of a step would leave the engine with a plan that was
    neither run nor dropped. A second Ctrl-C does not wait. Elsewhere than in the main thread, or
    under someone else's handler, nothing changes.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or handler is not signal.default_int_handler:
        yield lambda: None
        return
    count = 0

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    def check() -> None:
        if count:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, handler)
    check()
