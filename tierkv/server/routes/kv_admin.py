"""What an administrator may do with the cache: flush, export, import, sleep."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tierkv.engine.kv_hints import check_session
from tierkv.errors import ConflictError, RequestError
from tierkv.server import kv_schemas, kv_transfer, tenants
from tierkv.server.bodies import parse_strictly
from tierkv.server.context import ServerContext, body_parts, read_body
from tierkv.server.kv_body import WaitBody
from tierkv.server.openapi import BODY_ERRORS, operation
from tierkv.server.replies import Json

MEDIA_TYPE = "application/octet-stream"
BINARY = {"type": "string", "format": "binary"}
_PAUSE_S = 0.02


class KvAdminRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._engine = context.engine

    async def flush(self, request: Request) -> Response:
        """Return when all that is on its way to a lower tier has arrived."""
        seconds = (await self._wait_body(request)).timeout
        found = await self._ask_until("pending", lambda f: not any(f.values()), seconds)
        return JSONResponse({"flushed": not any(found.values()), **found})

    async def export(
        self, session_id: Annotated[str, Query()], tenant: Annotated[str | None, Query()] = None
    ) -> Response:
        """The KV of a session as a file; `tenant` if it is another's."""
        check_session(session_id, "session_id")
        pieces = kv_transfer.export(self._engine, owner_of(tenant), session_id)
        first = await anext(pieces)
        headers = {"Content-Disposition": 'attachment; filename="session.tierkv"'}
        return StreamingResponse(_joined(first, pieces), media_type=MEDIA_TYPE, headers=headers)

    async def import_file(
        self, request: Request, tenant: Annotated[str | None, Query()] = None
    ) -> Response:
        """Load the file of a session, or, if anything is wrong with it, nothing of it."""
        most = kv_transfer.most_bytes(self._engine.info)
        with tempfile.TemporaryFile(prefix="tierkv-import-") as file:
            try:
                async for part in body_parts(request, most):
                    await asyncio.to_thread(file.write, part)
                await asyncio.to_thread(file.flush)
            except OSError as error:
                raise HTTPException(507, f"the file cannot be kept: {error.strerror}") from None
            return JSONResponse(await kv_transfer.take_in(self._engine, file, owner_of(tenant)))

    async def sleep(self, request: Request) -> Response:
        """Send the pool's KV down and give its memory back; requests wait until `/kv/wake`."""
        return JSONResponse(await self._sleep((await self._wait_body(request)).timeout))

    async def wake(self) -> Json:
        """Go on with the requests that wait."""
        found: Json = await self._engine.kv("wake")
        return found

    async def vllm_sleep(self, level: Annotated[int, Query()] = 1) -> Response:
        """vLLM's spelling of `/kv/sleep`; the weights stay."""
        if level != 1:
            raise RequestError("level", level, "must be 1: weights stay where they are")
        await self._sleep(WaitBody().timeout)
        return Response()

    async def vllm_wake(self) -> Response:
        """vLLM's spelling of `/kv/wake`."""
        await self._engine.kv("wake")
        return Response()

    async def vllm_is_sleeping(self) -> Json:
        """Whether the engine sleeps, or falls asleep."""
        return {"is_sleeping": (await self._engine.kv("sleep_state"))["state"] != "awake"}

    async def _sleep(self, seconds: float) -> Json:
        await self._engine.kv("sleep")
        falling = "falling asleep"
        found = await self._ask_until("sleep_state", lambda f: f["state"] != falling, seconds)
        if found["state"] == falling:
            fix = f"is not over in {seconds:g} s: what goes down has not arrived; it goes on"
            raise ConflictError("sleep", falling, fix)
        return found

    async def _ask_until(
        self, question: str, is_over: Callable[[Json], bool], seconds: float
    ) -> Json:
        """The first answer that says it is over, or the last one in time."""
        end = time.monotonic() + seconds
        while True:
            found: Json = await self._engine.kv(question)
            if is_over(found) or time.monotonic() > end:
                return found
            await asyncio.sleep(_PAUSE_S)

    async def _wait_body(self, request: Request) -> WaitBody:
        if request.headers.get("content-length") == "0":
            return WaitBody()
        raw = await read_body(request)
        return parse_strictly(raw, WaitBody) if raw else WaitBody()


def owner_of(tenant: str | None) -> str:
    """Whose session is meant: the caller's own unless it names another tenant."""
    return tenants.caller().tenant.name if tenant is None else tenant


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest) as pieces:
        yield first
        async for piece in pieces:
            yield piece


def router(context: ServerContext) -> APIRouter:
    """`/kv/flush`, `/kv/export`, `/kv/import`, `/kv/sleep`, `/kv/wake`, and vLLM's spellings."""
    routes, api = APIRouter(dependencies=[Depends(context.check_admin)]), KvAdminRoutes(context)
    errors: dict[str, Any] = {"errors": (*BODY_ERRORS, 409, 503), "is_admin": True}
    file = {MEDIA_TYPE: {"schema": BINARY}}
    about = operation("tierkv", **errors)
    about["responses"][200]["content"] = file
    routes.add_api_route("/kv/export", api.export, **about, response_class=Response)
    about = operation("tierkv", reply=kv_schemas.KvImported, **errors)
    about["openapi_extra"]["requestBody"] = {"required": True, "content": file}
    routes.add_api_route("/kv/import", api.import_file, methods=["POST"], **about)
    sleep, flushed = kv_schemas.KvSleep, kv_schemas.KvFlushed
    posts: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "/kv/flush": (api.flush, operation("tierkv", body=WaitBody, reply=flushed, **errors)),
        "/kv/sleep": (api.sleep, operation("tierkv", body=WaitBody, reply=sleep, **errors)),
        "/kv/wake": (api.wake, operation("tierkv", reply=sleep, **errors)),
        "/sleep": (api.vllm_sleep, operation("vLLM", **errors)),
        "/wake_up": (api.vllm_wake, operation("vLLM", **errors)),
    }
    for path, (handler, about) in posts.items():
        if "requestBody" in about["openapi_extra"]:
            about["openapi_extra"]["requestBody"]["required"] = False
        routes.add_api_route(path, handler, methods=["POST"], **about)
    about = operation("vLLM", reply=kv_schemas.Sleeping, **errors)
    routes.add_api_route("/is_sleeping", api.vllm_is_sleeping, **about)
    return routes
