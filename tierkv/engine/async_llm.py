"""`AsyncLLM`: the engine in its own process, behind an asyncio front end."""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from tierkv.config import EngineConfig
from tierkv.engine import wire
from tierkv.engine.beam import BeamSearchParams
from tierkv.engine.client import EngineClient
from tierkv.engine.core import EngineInfo, EngineRequest
from tierkv.engine.inputs import (
    InputProcessor,
    ParsedPrompt,
    Prompt,
    parse_conversations,
    parse_prompt,
)
from tierkv.engine.kv_hints import Hints, KvHints
from tierkv.engine.output_processor import OutputProcessor, RequestState
from tierkv.engine.outputs import RequestOutput, SequenceOutput
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tokenizer import Tokenizer, load_tokenizer
from tierkv.errors import EngineDeadError, RequestError, TierkvError

T = TypeVar("T")
_LONG_TEXT = 2000  # characters; tokenising more would hold up the event loop for milliseconds


class Watch(Protocol):
    """Sees one request from its arrival, when it is made, to its end."""

    def on_output(self, news: SequenceOutput) -> None:
        """An output has come from the engine. A lock is held, in a thread that all requests
        share: this must not wait."""
        ...

    def on_end(self, state: RequestState, error: TierkvError | None) -> None:
        """Nobody reads on: it is finished, or was given up. Called in the reader's task."""
        ...


class _Waiter:
    """A generator that waits for news of its request; the request's state is its mailbox."""

    def __init__(self, state: RequestState, watch: Watch | None) -> None:
        self.state, self.watch = state, watch
        self.loop = asyncio.get_running_loop()
        self.has_news = asyncio.Event()
        self.num_seen = 0
        self.error: TierkvError | None = None


class AsyncLLM:
    """A model served by an engine process, for one or more event loops.

    A slow consumer never holds up others and nothing queues up for it: outputs are snapshots
    (or, with `delta=True`, what came since the last one) taken when it asks.

    Make one with `from_options`; end it with `shutdown`.

    Attributes:
        make_watch: called for each request as it comes, None for not watching any.
        scope: makes each prompt its caller's (tenant, cache salt), None where nobody has any. It
            is called by the task that reads the outputs.
    """

    def __init__(self, config: EngineConfig, *, log_format: str | None = None) -> None:
        """As `from_options`; with a `log_format` the engine process logs in it."""
        self.make_watch: Callable[[], Watch] | None = None
        self.scope: Callable[[ParsedPrompt], None] | None = None
        self._lock = threading.Lock()  # guards what both event loops and the receiver touch
        self._waiters: dict[str, _Waiter] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._engine_ids: dict[str, str] = {}
        self._numbers = itertools.count()
        self._death: EngineDeadError | None = None
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tierkv-tokenize")
        self._client = EngineClient(config, log_format)
        try:
            self._tokenizer = load_tokenizer(
                self.info.tokenizer,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
            )
        except BaseException:
            self._client.close()
            raise
        self._inputs = InputProcessor(self._tokenizer, self.info)
        self._outputs = OutputProcessor(self._tokenizer)
        self._client.listen(self._on_message, self._on_death)

    @classmethod
    def from_options(cls, model: str = "demo", **options: Any) -> AsyncLLM:
        """Start an engine process and wait until its model is loaded (blocks for seconds).

        Args:
            model: the built-in `demo`, a Hugging Face directory, or a hub id.
            options: fields of `EngineConfig`.

        Raises:
            ConfigError: an option is unknown or wrong, here or found while loading.
            EngineDeadError: the process ended while it started.
        """
        return cls(EngineConfig.from_mapping({"model": model, **options}))

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model: lengths, vocabulary, pool."""
        return self._client.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None for a model without one."""
        return self._tokenizer.hf if self._tokenizer is not None else None

    @property
    def is_dead(self) -> bool:
        """The engine process has ended, or was shut down."""
        return self._death is not None

    # -- requests ------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        kv_hints: Hints = None,
        tenant: str = "",
        delta: bool = False,
        beam_search: BeamSearchParams | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Outputs of one request as it grows; the last has `finished` set.

        Closing or cancelling the iterator aborts the request in the engine.

        Args:
            prompt: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`.
            sampling_params: default `SamplingParams()`.
            request_id: unique among live requests; made up when None.
            priority: lower runs first under `scheduling_policy="priority"`.
            cache_salt: shares cached blocks only with requests of the same salt.
            kv_hints: what the request says of its own KV (`KvHints`, or a mapping of its fields).
            tenant: who is served, for `scheduling_policy="fair"` and quotas.
            delta: each output holds only what is new since the one before.
            beam_search: search instead of sampling; `sampling_params` then say how many of the
                best hypotheses there are (`n`, the beam width) and how their text is made.

        Raises (here, or with the first item):
            RequestError: naming the field, the value and the fix.
            EngineDeadError: the engine process ended.
        """
        parsed = parse_prompt(prompt)
        parsed.cache_salt = cache_salt or parsed.cache_salt
        parsed.tenant, parsed.hints = tenant, KvHints.parse(kv_hints)
        parsed.beam = beam_search
        return self._generate(parsed, sampling_params, request_id, priority, delta)

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        kv_hints: Hints = None,
        tenant: str = "",
        delta: bool = False,
        beam_search: BeamSearchParams | None = None,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """As `generate`, for a conversation; `template_options` as in `Tokenizer.chat_text`."""
        (conversation,) = parse_conversations([messages])
        parsed = self._inputs.chat_prompt(conversation, **template_options)
        parsed.cache_salt = cache_salt
        parsed.tenant, parsed.hints = tenant, KvHints.parse(kv_hints)
        parsed.beam = beam_search
        return self._generate(parsed, sampling_params, request_id, priority, delta)

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The ids that `generate` would compute for this prompt."""
        parsed = parse_prompt(prompt)
        parsed.add_special_tokens = add_special_tokens
        return await self._tokenize(parsed)

    async def tokenize_chat(
        self, messages: list[dict[str, Any]], **template_options: Any
    ) -> list[int]:
        """The ids that `chat` would compute for this conversation."""
        (conversation,) = parse_conversations([messages])
        return await self._tokenize(self._inputs.chat_prompt(conversation, **template_options))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests now; their iterators deliver one more output, with reason "abort"."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        with self._lock:
            engine_ids = [self._engine_ids[i] for i in ids if i in self._engine_ids]
        self._client.send("abort", engine_ids)

    def abort_all(self) -> None:
        """End every request now, as `abort` does; may be called from any thread."""
        with self._lock:
            engine_ids = list(self._waiters)
        self._client.send("abort", engine_ids)

    # -- the engine ----------------------------------------------------------------------------

    async def metrics(self) -> dict[str, Any]:
        """Counters since the start and gauges of now, by name."""
        found: dict[str, Any] = await self._call("metrics")
        return found

    async def snapshot(self) -> dict[str, Any]:
        """Where blocks are, what moves, who runs and who waits (`engine/observe.py`)."""
        found: dict[str, Any] = await self._call("snapshot")
        return found

    async def describe_request(self, request_id: str) -> dict[str, Any] | None:
        """What happened to a request, by the id that snapshots give it; None when forgotten."""
        found: dict[str, Any] | None = await self._call("request", request_id)
        return found

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks, on disk too. False, and nothing happens, while requests hold
        blocks; False, and the log says why, when a disk has not confirmed it."""
        return bool(await self._call("reset_prefix_cache"))

    async def kv(self, name: str, *arguments: Any) -> Any:
        """One of the calls of `KvControl`, which says what they take, answer and raise."""
        return await self._call(f"kv_{name}", *arguments)

    def set_tenants(self, tenants: list[dict[str, Any]]) -> None:
        """Who shares the service and the tiers (`KvControl.set_tenants`), for all requests that
        come after this call."""
        self._begin_call("kv_set_tenants", tenants)

    async def check_health(self, timeout_s: float | None = None) -> None:
        """Return if the engine lives and, given a timeout, answers between two steps within it.

        Raises:
            EngineDeadError: it does not.
        """
        self._require_alive()
        if timeout_s is not None:
            try:
                await asyncio.wait_for(self._call("ping"), timeout_s)
            except TimeoutError:
                raise EngineDeadError(f"the engine did not answer in {timeout_s} s") from None

    def shutdown(self) -> None:
        """End the engine process and remove its sockets; whoever waits gets EngineDeadError."""
        self._bury(EngineDeadError("the engine was shut down"))
        self._client.close()
        self._pool.shutdown(wait=False)

    def kill(self) -> None:
        """End the engine process at once: what is on its way to a lower tier does not arrive.
        May be called from a signal handler, during `shutdown` too."""
        self._client.kill()

    def __del__(self) -> None:
        if hasattr(self, "_client"):
            self.shutdown()

    # -- how it runs ---------------------------------------------------------------------------

    async def _generate(
        self,
        prompt: ParsedPrompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        delta: bool,
    ) -> AsyncGenerator[RequestOutput]:
        watch = self.make_watch() if self.make_watch is not None else None
        if self.scope is not None:
            self.scope(prompt)
        shown_id = request_id or uuid.uuid4().hex
        # An id may be used again at once; the last outputs of its former owner may still be on
        # their way, so the engine knows requests by ids of its own.
        engine_id = f"{shown_id}/{next(self._numbers)}"
        request = await self._in_pool_if_long(
            prompt,
            lambda: self._inputs.request(engine_id, prompt, params or SamplingParams(), priority),
        )
        waiter = self._submit(request, prompt.text, shown_id, watch)
        try:
            is_finished = False
            while not is_finished:
                await waiter.has_news.wait()
                waiter.has_news.clear()
                output = self._take(waiter, delta)
                if output is not None:
                    is_finished = output.finished
                    yield output
        finally:
            self._release(waiter)

    async def _tokenize(self, prompt: ParsedPrompt) -> list[int]:
        return await self._in_pool_if_long(prompt, lambda: self._inputs.tokenize(prompt))

    async def _in_pool_if_long(self, prompt: ParsedPrompt, work: Callable[[], T]) -> T:
        if prompt.text is None or len(prompt.text) < _LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _submit(
        self, request: EngineRequest, prompt: str | None, shown_id: str, watch: Watch | None
    ) -> _Waiter:
        message = wire.pack("add", wire.encode_request(request))
        with self._lock:
            self._require_alive()
            if shown_id in self._engine_ids:
                raise RequestError("request_id", shown_id, "is in use by a live request")
            waiter = _Waiter(self._outputs.add(request, prompt, shown_id=shown_id), watch)
            self._waiters[request.request_id] = waiter
            self._engine_ids[shown_id] = request.request_id
        self._client.send_packed(message)
        return waiter

    def _take(self, waiter: _Waiter, delta: bool) -> RequestOutput | None:
        """What the state holds now, None when that was seen before."""
        state = waiter.state
        with self._lock:
            if waiter.error is not None and not state.is_finished:
                raise waiter.error
            if state.num_updates == waiter.num_seen:
                return None
            waiter.num_seen = state.num_updates
            return state.take_delta() if delta else state.output()

    def _release(self, waiter: _Waiter) -> None:
        """The generator ends; so does its request, if it still runs."""
        request_id = waiter.state.request_id
        with self._lock:
            del self._waiters[request_id]
            del self._engine_ids[waiter.state.shown_id]
            self._outputs.forget(request_id)
            is_running = not waiter.state.is_finished and self._death is None
        if is_running:
            self._client.send("abort", [request_id])
        if waiter.watch is not None:
            waiter.watch.on_end(waiter.state, waiter.error)

    async def _call(self, name: str, *arguments: Any) -> Any:
        return await asyncio.wrap_future(self._begin_call(name, *arguments))

    def _begin_call(self, name: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._require_alive()
            call_id = next(self._numbers)
            self._calls[call_id] = future
        self._client.send("call", call_id, name, *arguments)
        return future

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(str(self._death))

    # -- called from the client's thread -------------------------------------------------------

    def _on_message(self, kind: str, values: list[Any]) -> None:
        if kind == "outputs":
            self._on_outputs(values[0])
        elif kind == "rejected":
            self._on_rejected(*values)
        elif kind == "result":
            self._on_result(*values)
        elif kind == "refused":
            self._on_refused(*values)

    def _on_outputs(self, packed: list[Any]) -> None:
        outputs = [wire.decode_output(output) for output in packed]
        with self._lock:
            self._show(outputs)
            changed, stops = self._outputs.process(outputs)
            waiters = [self._waiters[state.request_id] for state in changed]
        for stop in stops:
            self._client.send("stop", stop.request_id, stop.index)
        _wake(waiters)

    def _show(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            waiter = self._waiters.get(output.request_id)
            if waiter is not None and waiter.watch is not None:
                waiter.watch.on_output(output)

    def _on_rejected(self, request_id: str, error: list[Any]) -> None:
        with self._lock:
            waiter = self._waiters.get(request_id)
            self._outputs.forget(request_id)
            if waiter is not None:
                waiter.error = wire.decode_error(error)
        _wake([waiter] if waiter is not None else [])

    def _on_result(self, call_id: int, value: Any) -> None:
        with self._lock:
            future = self._calls.pop(call_id)
        if future.set_running_or_notify_cancel():
            future.set_result(value)

    def _on_refused(self, call_id: int, error: list[Any]) -> None:
        with self._lock:
            future = self._calls.pop(call_id)
        if future.set_running_or_notify_cancel():
            future.set_exception(wire.decode_error(error))

    def _on_death(self, error: EngineDeadError) -> None:
        self._bury(error)

    def _bury(self, error: EngineDeadError) -> None:
        """Whoever waits, and whoever comes, gets `error`; only the first one counts."""
        with self._lock:
            if self._death is not None:
                return
            self._death = error
            waiters, calls = list(self._waiters.values()), list(self._calls.values())
            self._calls.clear()
            for waiter in waiters:
                waiter.error = EngineDeadError(str(error))
        _wake(waiters)
        for future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineDeadError(str(error)))


def _wake(waiters: list[_Waiter]) -> None:
    """Set the events of `waiters`, with one call into each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Waiter]] = {}
    for waiter in waiters:
        by_loop.setdefault(waiter.loop, []).append(waiter)
    for loop, members in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_events, members)
        except RuntimeError:
            continue  # the loop is closed: nobody waits there any more


def _set_events(waiters: list[_Waiter]) -> None:
    for waiter in waiters:
        waiter.has_news.set()
