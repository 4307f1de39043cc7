"""The cache itself: what is where, and what is to be there (`docs/kv-control.md`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import Request

from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import InvariantError, RequestError
from tierkv.server import kv_schemas, tenants
from tierkv.server.bodies import parse_strictly
from tierkv.server.context import ServerContext, read_body
from tierkv.server.kv_body import PrefixBody, TimedPrefixBody, WarmBody
from tierkv.server.mapped_reply import chat_reply, naming_fields_of
from tierkv.server.openapi import GENERATION_ERRORS, operation
from tierkv.server.replies import Json

Handler = Callable[[Request], Awaitable[Response]]


class KvRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context, self._engine = context, context.engine

    async def stats(self) -> Json:
        """Bytes by tier, pins, moves; a tenant's key shows the tenant's own."""
        who = tenants.caller()
        has_all = who.is_admin or not self._context.callers.tenants
        found: Json = await self._engine.kv("stats", None if has_all else who.tenant.name)
        return found

    async def warm(self, request: Request) -> Response:
        """Compute a prefix now, so that requests that begin with it find it."""
        body = parse_strictly(await read_body(request), WarmBody)
        token_ids = await self._token_ids(body)
        reply = WarmReply(self._context, body, token_ids)
        return await self._context.answer(request, body, lambda: reply, stream=False)

    async def pin(self, request: Request) -> Response:
        """Keep a prefix or a session."""
        return await self._about(request, TimedPrefixBody, "pin")

    async def unpin(self, request: Request) -> Response:
        """Let it go its way."""
        return await self._about(request, PrefixBody, "unpin")

    async def ttl(self, request: Request) -> Response:
        """Let a prefix or a session be the first to go, some time from now."""
        return await self._about(request, TimedPrefixBody, "ttl")

    async def _about(self, request: Request, kind: type[PrefixBody], call: str) -> Response:
        body = parse_strictly(await read_body(request), kind)
        token_ids = None if body.session_id is not None else await self._token_ids(body)
        salt = self._context.callers.salt(body.cache_salt or "")
        arguments: list[Any] = [tenants.caller().tenant.name, salt, token_ids, body.session_id]
        if isinstance(body, TimedPrefixBody):
            arguments.append(body.ttl)
        with naming_fields_of(body):
            return JSONResponse(await self._engine.kv(call, *arguments))

    async def _token_ids(self, body: PrefixBody) -> list[int]:
        model = self._context.known_model(body.model)
        with naming_fields_of(body):
            if body.messages is not None:
                token_ids = await chat_reply(self._context, body, model).prompt_token_ids()
            else:
                token_ids = await self._engine.tokenize(body.prompt or [])
        most = self._engine.info.max_model_len
        if len(token_ids) > most:
            fix = f"is longer than any request can be: max_model_len is {most}"
            name = "prompt" if body.messages is None else "messages"
            raise RequestError(name, f"<{len(token_ids)} tokens>", fix)
        return token_ids


class WarmReply:
    """The reply to `/kv/warm`: a request whose answer nobody wants."""

    num_sequences = 1

    def __init__(self, context: ServerContext, body: WarmBody, token_ids: list[int]) -> None:
        self._context, self._engine = context, context.engine
        self._body, self._token_ids = body, token_ids

    async def body(self) -> Json:
        """Computes, pins if that is wanted, and says where the prefix is."""
        body, who = self._body, tenants.caller()
        # Of a pin, `ttl` says how long it holds; afterwards the blocks are like any other.
        ttl = None if body.pin else body.ttl
        hints = {"ttl": ttl, "priority": body.priority, "session_id": body.session_id}
        outputs = self._engine.generate(
            self._token_ids,
            SamplingParams(max_tokens=1, detokenize=False),
            cache_salt=body.cache_salt or "",
            kv_hints=hints,
        )
        num_reused = 0
        async with aclosing(outputs):
            async for output in outputs:
                num_reused = output.num_cached_tokens or 0
        salt = self._context.callers.salt(body.cache_salt or "")
        found: Json = {}
        if body.pin:
            pin = who.tenant.name, salt, self._token_ids, None, body.ttl
            found = await self._engine.kv("pin", *pin)
        where: Json = await self._engine.kv("where", salt, self._token_ids)
        return {**found, **where, "computed_tokens": len(self._token_ids) - num_reused}

    def events(self) -> AsyncGenerator[bytes, None]:
        """There is no stream of it."""
        raise InvariantError("warming is not streamed")

    def error_event(self, error: Exception) -> bytes:
        """There is no stream of it."""
        raise InvariantError("warming is not streamed")


def router(context: ServerContext) -> APIRouter:
    """`/kv/stats`, `/kv/warm`, `/kv/pin`, `/kv/unpin`, `/kv/ttl`."""
    keyed = [Depends(context.check_key)]
    routes, api = APIRouter(dependencies=keyed, prefix="/kv"), KvRoutes(context)
    about = operation("tierkv", reply=kv_schemas.KvStats, errors=(503,), is_keyed=True)
    routes.add_api_route("/stats", api.stats, **about)
    posts: list[tuple[str, Handler, type[PrefixBody], type[BaseModel]]] = [
        ("/warm", api.warm, WarmBody, kv_schemas.KvWarmed),
        ("/pin", api.pin, TimedPrefixBody, kv_schemas.KvPinned),
        ("/unpin", api.unpin, PrefixBody, kv_schemas.KvUnpinned),
        ("/ttl", api.ttl, TimedPrefixBody, kv_schemas.KvTimed),
    ]
    errors = (*GENERATION_ERRORS, 409)
    for path, handler, body, reply in posts:
        about = operation("tierkv", body=body, reply=reply, errors=errors, is_keyed=True)
        routes.add_api_route(path, handler, methods=["POST"], **about)
    return routes
