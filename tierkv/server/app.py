"""The HTTP application: routes, errors, keys. OpenAI's API over one `AsyncLLM`."""

from __future__ import annotations

import importlib.metadata
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import EngineDeadError, QueueFullError, RequestError
from tierkv.server import sse
from tierkv.server.generation import ChatReply, CompletionReply, Reply, stream_events
from tierkv.server.protocol import ChatBody, CompletionBody, GenerationBody, parse_body
from tierkv.server.replies import Json, error_body
from tierkv.server.streams import ClientGone, until_client_leaves

MAX_BODY_BYTES = 64 * 2**20
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it


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


class Api:
    """The handlers, over one engine."""

    def __init__(self, engine: AsyncLLM, settings: AppSettings) -> None:
        self._engine, self._settings = engine, settings
        self._created = int(time.time())
        self._num_sequences = 0

    # -- what it is ----------------------------------------------------------------------------

    async def health(self) -> Response:
        """200 while the engine lives, 503 after."""
        await self._engine.check_health()
        return Response()

    async def version(self) -> Json:
        return {"version": importlib.metadata.version("tierkv")}

    async def models(self) -> Json:
        return {"object": "list", "data": [self._card(n) for n in self._settings.model_names]}

    async def model(self, name: str) -> Json:
        return self._card(self._known(name))

    def _card(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "tierkv",
            "max_model_len": self._engine.info.max_model_len,
        }

    def _known(self, name: str | None) -> str:
        names = self._settings.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise UnknownModelError("model", name, f"is not served here; known: {', '.join(names)}")
        return name

    # -- completions ---------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        body = parse_body(await read_body(request), CompletionBody)
        model = self._known(body.model)
        return await self._answer(request, body, lambda: CompletionReply(self._engine, body, model))

    async def chat(self, request: Request) -> Response:
        body = parse_body(await read_body(request), ChatBody)
        model, template = self._known(body.model), self._settings.chat_template
        return await self._answer(
            request, body, lambda: ChatReply(self._engine, body, model, template)
        )

    async def _answer(
        self, request: Request, body: GenerationBody, make_reply: Callable[[], Reply]
    ) -> Response:
        try:
            return await self._respond(request, body, make_reply())
        except RequestError as error:
            name = body.public_name(error.field)
            raise type(error)(name, error.value, error.fix) from None

    async def _respond(self, request: Request, body: GenerationBody, reply: Reply) -> Response:
        if not body.stream:
            with self._in_flight(reply.num_sequences):
                return JSONResponse(await until_client_leaves(request, reply.body()))
        events = self._events(reply, wants_usage=body.wants_usage_chunk)
        # Errors of the request itself come with the first event, in time for a status code.
        first = await until_client_leaves(request, anext(events))
        return StreamingResponse(
            prepend(first, events), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS
        )

    async def _events(self, reply: Reply, *, wants_usage: bool) -> AsyncGenerator[bytes, None]:
        with self._in_flight(reply.num_sequences):
            async with aclosing(stream_events(reply, wants_usage=wants_usage)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _in_flight(self, count: int) -> Iterator[None]:
        limit = self._settings.max_sequences
        if self._num_sequences + count > limit:
            fix = f"{self._num_sequences} of {limit} sequences are in flight: try again later"
            raise QueueFullError("n", count, fix)
        self._num_sequences += count
        try:
            yield
        finally:
            self._num_sequences -= count

    # -- keys ----------------------------------------------------------------------------------

    async def check_key(self, request: Request) -> None:
        """Refuse a `/v1/` request without the key, when there is one."""
        if self._settings.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = secrets.compare_digest(given.encode(), self._settings.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise HTTPException(401, "give the API key as `Authorization: Bearer KEY`")


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


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


# -- errors ----------------------------------------------------------------------------------------


def describe_error(error: Exception) -> tuple[int, Json]:
    """Status and body for an error that is the client's or the engine's."""
    if isinstance(error, UnknownModelError):
        return 404, error_body(str(error), "invalid_request_error", "model", "model_not_found")
    if isinstance(error, QueueFullError):
        return 429, error_body(str(error), "rate_limit_error", None, "queue_full")
    if isinstance(error, RequestError):
        return 400, error_body(str(error), "invalid_request_error", error.field, None)
    if isinstance(error, EngineDeadError):
        return 503, error_body(str(error), "server_error", None, "engine_dead")
    raise error


async def on_error(request: Request, error: Exception) -> Response:
    status, body = describe_error(error)
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(body, status, headers=headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Wrong paths, methods and keys, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    code = "invalid_api_key" if error.status_code == 401 else None
    body = error_body(error.detail, "invalid_request_error", None, code)
    return JSONResponse(body, error.status_code, headers=error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the server logs the traceback after this."""
    body = error_body(f"internal error: {type(error).__name__}", "server_error", None, None)
    # The connection ends with it; a client that was not told would send its next request there.
    return JSONResponse(body, 500, headers={"Connection": "close"})


async def on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def make_app(engine: AsyncLLM, settings: AppSettings) -> FastAPI:
    """The application; it does not end the engine."""
    api = Api(engine, settings)
    app = FastAPI(title="tierkv", openapi_url=None, docs_url=None, redoc_url=None)
    keyed = [Depends(api.check_key)]
    app.add_api_route("/health", api.health)
    app.add_api_route("/version", api.version)
    app.add_api_route("/v1/models", api.models, dependencies=keyed)
    # Names may hold slashes: organisation/model.
    app.add_api_route("/v1/models/{name:path}", api.model, dependencies=keyed)
    for path, handler in (("completions", api.completions), ("chat/completions", api.chat)):
        app.add_api_route(f"/v1/{path}", handler, methods=["POST"], dependencies=keyed)
    for kind in (RequestError, EngineDeadError):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
    return app
