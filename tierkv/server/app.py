"""The HTTP application: the routes of every API over one `AsyncLLM`, and what errors look like."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import EngineDeadError, RequestError
from tierkv.server import errors
from tierkv.server.context import AppSettings, ServerContext
from tierkv.server.routes import completions, info
from tierkv.server.streams import ClientGone

__all__ = ["AppSettings", "make_app"]

ROUTERS = (info.router, completions.router)


def make_app(engine: AsyncLLM, settings: AppSettings) -> FastAPI:
    """The application; it does not end the engine."""
    context = ServerContext(engine, settings)
    app = FastAPI(title="tierkv", openapi_url=None, docs_url=None, redoc_url=None)
    for router in ROUTERS:
        app.include_router(router(context))
    for kind in (RequestError, EngineDeadError):
        app.add_exception_handler(kind, errors.on_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(ClientGone, errors.on_client_gone)
    app.add_exception_handler(Exception, errors.on_bug)
    return app
