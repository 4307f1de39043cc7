"""What all routes share: the engine, the settings, keys, and the limits on what is in flight."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import EngineDeadError, QueueFullError, RequestError
from tierkv.server import sse
from tierkv.server.errors import AbortedError, RequestTimeoutError, UnknownModelError
from tierkv.server.observability import Observability
from tierkv.server.replies import Json
from tierkv.server.streams import until_client_leaves
from tierkv.server.tenants import Caller, Callers
from tierkv.server.tracing import Tracing

MAX_BODY_BYTES = 64 * 2**20
JSON_TYPE = "application/json"
LATE_S = 1.0
"""How long after its time a stream ends whose client has stopped to read."""


@dataclass(slots=True)
class AppSettings:
    """What the application needs to know besides the engine.

    Attributes:
        model_names: names that requests may use; the first one is shown.
        api_key: what `/v1/` requests must bring as a bearer token, None for no check.
        admin_api_key: what requests to endpoints for administrators must bring.
        tenants: further keys, and whose they are (`tenants.read_keys`).
        chat_template: replaces the tokenizer's template.
        max_sequences: sequences in flight, running and waiting; beyond it requests get 503. Of
            each tenant, where there are tenants: none fills the queue for the others.
        request_timeout: seconds that a request may take, None for any number.
        enable_auto_tool_choice: the model may call tools without being told to.
        tool_parser: how the model writes its calls, a name of `--tool-call-parser`.
        log_requests: log a line for each request.
        tracing: where spans go, None for nowhere.
    """

    model_names: list[str]
    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
    tenants: dict[str, Caller] = field(default_factory=dict, repr=False)
    chat_template: str | None = None
    max_sequences: int = 1024
    request_timeout: float | None = None
    enable_auto_tool_choice: bool = False
    tool_parser: str | None = None
    log_requests: bool = False
    tracing: Tracing | None = None


class Body(Protocol):
    """A parsed request body, as far as errors are concerned."""

    def public_name(self, field: str) -> str:
        """The body's field for a field of the engine's request."""
        ...


class Reply(Protocol):
    """An answer to one request, not begun yet."""

    @property
    def num_sequences(self) -> int:
        """Sequences that it keeps in flight."""
        ...

    async def body(self) -> Json:
        """The whole answer at once."""
        ...

    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. The first comes with the first output, so what the
        engine refuses is raised before it, in time for a status code."""
        ...

    def error_event(self, error: Exception) -> bytes:
        """The last event of a stream that `error` ends."""
        ...


class ServerContext:
    """The engine and what requests have in common."""

    def __init__(self, engine: AsyncLLM, settings: AppSettings) -> None:
        self.engine, self.settings = engine, settings
        self.created = int(time.time())
        self.callers = Callers(settings.api_key, settings.admin_api_key, settings.tenants)
        self._num_of: Counter[str] = Counter()
        self.is_exiting = False  # streams that would never end then do
        self.observability = Observability(
            engine,
            model_name=settings.model_names[0],
            tracing=settings.tracing,
            log_requests=settings.log_requests,
        )
        if self.callers.tenants:
            engine.scope = self.callers.scope
            engine.set_tenants([tenant.message() for tenant in self.callers.tenants])
        self.observability.metrics.watch_queue(lambda: self.num_sequences, settings.max_sequences)

    def known_model(self, name: str | None) -> str:
        """The model that a request names; the first one if it names none.

        Raises:
            UnknownModelError: it is not served here.
        """
        names = self.settings.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise UnknownModelError("model", name, f"is not served here; known: {', '.join(names)}")
        return name

    async def check_key(self, request: Request) -> None:
        """Refuse a request without a key, when there is one."""
        self.callers.admit(request)

    async def check_admin(self, request: Request) -> None:
        """Refuse a request without the key of an administrator."""
        self.callers.admit_admin(request)

    async def answer(
        self, request: Request, body: Body, make_reply: Callable[[], Reply], *, stream: bool
    ) -> Response:
        """Make the reply and send it, at once or as a stream.

        The client's leaving and the end of its time abort it.
        """
        try:
            return await self._respond(request, make_reply(), stream=stream)
        except RequestError as error:
            name = body.public_name(error.field)
            raise type(error)(name, error.value, error.fix) from None

    async def _respond(self, request: Request, reply: Reply, *, stream: bool) -> Response:
        deadline = self._deadline()
        if not stream:
            with self._in_flight(reply.num_sequences):
                async with self._time_limit(deadline):
                    return JSONResponse(await until_client_leaves(request, reply.body()))
        events = self._events(reply, deadline)
        first = await until_client_leaves(request, anext(events))
        whole = self._whole(first, events, reply, deadline)
        return StreamingResponse(whole, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)

    async def _whole(
        self, first: bytes, rest: AsyncGenerator[bytes, None], reply: Reply, deadline: float | None
    ) -> AsyncGenerator[bytes, None]:
        """`first`, then the rest; an error on the way becomes the stream's last event."""
        late = None if deadline is None else deadline + LATE_S
        try:
            async with aclosing(rest) as events, closed_at(events, late) as is_closed:
                yield first
                async for event in events:
                    yield event
                if is_closed():
                    self.observability.metrics.timeouts.inc()
                    raise RequestTimeoutError("not read in time, and aborted")
        except (RequestError, EngineDeadError, RequestTimeoutError, AbortedError) as error:
            yield reply.error_event(error)

    async def _events(self, reply: Reply, deadline: float | None) -> AsyncGenerator[bytes, None]:
        with self._in_flight(reply.num_sequences):
            async with aclosing(reply.events()) as events:
                async for event in events if deadline is None else self._timed(events, deadline):
                    yield event

    async def _timed(
        self, events: AsyncGenerator[bytes, None], deadline: float
    ) -> AsyncGenerator[bytes, None]:
        while True:
            async with self._time_limit(deadline):
                event = await anext(events, None)
            if event is None:
                return
            yield event

    def _deadline(self) -> float | None:
        """When a request that arrives now must have been answered, on the event loop's clock."""
        seconds = self.settings.request_timeout
        return None if seconds is None else asyncio.get_running_loop().time() + seconds

    @asynccontextmanager
    async def _time_limit(self, deadline: float | None) -> AsyncIterator[None]:
        """Cancel what is done inside when its time is over.

        Raises:
            RequestTimeoutError: it was.
        """
        try:
            async with asyncio.timeout_at(deadline) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            self.observability.metrics.timeouts.inc()
            fix = f"not answered within {self.settings.request_timeout} s, and aborted"
            raise RequestTimeoutError(fix) from None

    @property
    def num_sequences(self) -> int:
        """Sequences in flight, of all tenants."""
        return self._num_of.total()

    @contextmanager
    def _in_flight(self, count: int) -> Iterator[None]:
        limit, tenant = self.settings.max_sequences, self.callers.tenant_name()
        if count > limit:
            fix = f"prompts times samples must be at most {limit}: more can never be in flight here"
            raise RequestError("n", count, fix)
        if self._num_of[tenant] + count > limit:
            fix = f"{self._num_of[tenant]} of {limit} sequences are in flight: try again later"
            raise QueueFullError("n", count, fix)
        self._num_of[tenant] += count
        try:
            yield
        finally:
            self._num_of[tenant] -= count


async def read_body(request: Request) -> bytes:
    """The body, up to 64 MiB. Pages elsewhere cannot send JSON here: browsers ask before they do.

    Raises:
        HTTPException: it is too large, or says that it is something else than JSON.
    """
    is_page_elsewhere = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    kind = request.headers.get("content-type", "" if is_page_elsewhere else JSON_TYPE)
    if kind.partition(";")[0].strip().lower() != JSON_TYPE:
        raise HTTPException(415, f"Content-Type={kind[:80]!r}: must be {JSON_TYPE}")
    return b"".join([part async for part in body_parts(request, MAX_BODY_BYTES)])


async def body_parts(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes, up to `most` bytes.

    Raises:
        HTTPException: it is larger.
    """
    too_large = HTTPException(413, f"the body is over {most} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        yield part


@asynccontextmanager
async def closed_at(
    events: AsyncGenerator[bytes, None], late: float | None
) -> AsyncIterator[Callable[[], bool]]:
    """Close the generator at a time on the event loop's clock, wherever it stands; yields what says
    whether that was done.

    A client that does not read holds up the sender, and with it everything that would look at the
    clock. (A generator that runs just then looks at it itself, and cannot be closed.)
    """
    tasks: list[asyncio.Task[None]] = []

    async def close() -> None:
        with suppress(RuntimeError):
            await events.aclose()

    loop = asyncio.get_running_loop()
    timer = None
    if late is not None:
        timer = loop.call_at(late, lambda: tasks.append(loop.create_task(close())))
    try:
        yield lambda: bool(tasks)
    finally:
        if timer is not None:
            timer.cancel()
        await asyncio.gather(*tasks)
