"""What all routes share: the engine, the settings, keys, and how many sequences are in flight."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import EngineDeadError, QueueFullError, RequestError
from tierkv.server import sse
from tierkv.server.errors import UnknownModelError, describe_error
from tierkv.server.replies import Json
from tierkv.server.streams import until_client_leaves

MAX_BODY_BYTES = 64 * 2**20


@dataclass(slots=True)
class AppSettings:
    """What the application needs to know besides the engine.

    Attributes:
        model_names: names that requests may use; the first one is shown.
        api_key: what `/v1/` requests must bring as a bearer token, None for no check.
        chat_template: replaces the tokenizer's template.
        max_sequences: sequences in flight, running and waiting; beyond it requests get 429.
    """

    model_names: list[str]
    api_key: str | None = field(default=None, repr=False)
    chat_template: str | None = None
    max_sequences: int = 1024


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


class ServerContext:
    """The engine and what requests have in common."""

    def __init__(self, engine: AsyncLLM, settings: AppSettings) -> None:
        self.engine, self.settings = engine, settings
        self.created = int(time.time())
        self.num_sequences = 0

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
        """Refuse a request without the key, when there is one."""
        if self.settings.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = secrets.compare_digest(given.encode(), self.settings.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise HTTPException(401, "give the API key as `Authorization: Bearer KEY`")

    async def answer(
        self, request: Request, body: Body, make_reply: Callable[[], Reply], *, stream: bool
    ) -> Response:
        """Make the reply and send it, at once or as a stream; the client's leaving aborts it."""
        try:
            return await self._respond(request, make_reply(), stream=stream)
        except RequestError as error:
            name = body.public_name(error.field)
            raise type(error)(name, error.value, error.fix) from None

    async def _respond(self, request: Request, reply: Reply, *, stream: bool) -> Response:
        if not stream:
            with self._in_flight(reply.num_sequences):
                return JSONResponse(await until_client_leaves(request, reply.body()))
        events = self._events(reply)
        first = await until_client_leaves(request, anext(events))
        return StreamingResponse(
            prepend(first, events), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS
        )

    async def _events(self, reply: Reply) -> AsyncGenerator[bytes, None]:
        with self._in_flight(reply.num_sequences):
            async with aclosing(reply.events()) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _in_flight(self, count: int) -> Iterator[None]:
        limit = self.settings.max_sequences
        if self.num_sequences + count > limit:
            fix = f"{self.num_sequences} of {limit} sequences are in flight: try again later"
            raise QueueFullError("n", count, fix)
        self.num_sequences += count
        try:
            yield
        finally:
            self.num_sequences -= count


async def read_body(request: Request) -> bytes:
    """The body, up to 64 MiB."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is over {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


async def prepend(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """`first`, then the rest; an error on the way becomes the stream's last event."""
    try:
        async with aclosing(rest) as events:
            yield first
            async for event in events:
                yield event
    except (RequestError, EngineDeadError) as error:
        yield sse.event(describe_error(error)[1])
