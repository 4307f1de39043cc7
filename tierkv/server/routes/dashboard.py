"""`/dashboard`: a page that shows the tiers, what moves between them, and who runs and waits.

The page and its files are the same for everybody and need no key; what they show does. It shows
the requests of all, so where there are tenants it needs the key of an administrator.
"""

from __future__ import annotations

import hashlib
import mimetypes
from importlib import resources

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tierkv.server import sse
from tierkv.server.context import ServerContext
from tierkv.server.feed import MOST_WATCHERS, Feed

_PAGE = "index.html"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MOST_ID = 512  # characters
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
}


class StaticFile:
    """A file of the page, in memory.

    Args:
        name: ends with the suffix that says what it is.
        content: its bytes.
    """

    def __init__(self, name: str, content: bytes) -> None:
        suffix = "." + name.rpartition(".")[2]
        kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._content = content
        self._headers = {
            "Content-Type": f"{kind}; charset=utf-8" if suffix in _TYPES else kind,
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
            "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        }

    def response(self, request: Request) -> Response:
        """The file, or that the client has it already."""
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def read_files() -> dict[str, StaticFile]:
    """The files of the page by name."""
    folder = resources.files("tierkv.server") / "static"
    paths = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: StaticFile(path.name, path.read_bytes()) for path in paths}


class DashboardRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._files = read_files()
        name = context.settings.model_names[0]
        self._feed = Feed(context.engine, name, lambda: context.is_exiting)

    async def page(self, request: Request) -> Response:
        """The page."""
        return self._files[_PAGE].response(request)

    async def file(self, request: Request, name: str) -> Response:
        """A file that the page asks for."""
        if name not in self._files:
            raise HTTPException(404, f"there is no file {name}")
        return self._files[name].response(request)

    async def events(self) -> Response:
        """What the page shows, as server-sent events (`tierkv/server/feed.py`)."""
        if self._feed.is_full:
            raise HTTPException(503, f"{MOST_WATCHERS} others watch: close a window")
        return StreamingResponse(
            self._feed.events(), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS
        )

    async def request(self, request: Request) -> Response:
        """What happened to the request `?id=`, and which cells hold its blocks."""
        identity = request.query_params.get("id", "")[:_MOST_ID]
        found = await self._context.engine.describe_request(identity)
        if found is None:
            raise HTTPException(404, "no request of this id is remembered")
        return JSONResponse(found, headers={"Cache-Control": "no-store"})


def router(context: ServerContext) -> APIRouter:
    """`/dashboard`, its files, and under it `events` and `request`."""
    routes, api = APIRouter(), DashboardRoutes(context)
    check = context.check_admin if context.callers.tenants else context.check_key
    keyed = [Depends(check)]
    routes.add_api_route("/dashboard", api.page)
    routes.add_api_route("/dashboard/static/{name}", api.file)
    routes.add_api_route("/dashboard/events", api.events, dependencies=keyed)
    routes.add_api_route("/dashboard/request", api.request, dependencies=keyed)
    return routes
