"""`GET /kv/record`: what requests come, for a trace, as long as somebody reads it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Depends
from fastapi.responses import Response, StreamingResponse

from tierkv.server import recording, sse
from tierkv.server.context import ServerContext


class RecordRoutes:
    """The handler, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def record(self) -> Response:
        """Record until the reader leaves (`tierkv/server/recording.py`)."""
        context = self._context
        lines = recording.lines(context.engine, lambda: context.is_exiting)
        first = await anext(lines)
        whole = _joined(first, lines)
        return StreamingResponse(whole, media_type=recording.MEDIA_TYPE, headers=sse.HEADERS)


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest) as lines:
        yield first
        async for line in lines:
            yield line


def router(context: ServerContext) -> APIRouter:
    """`/kv/record`, for administrators."""
    routes = APIRouter(dependencies=[Depends(context.check_admin)])
    routes.add_api_route("/kv/record", RecordRoutes(context).record)
    return routes
