"""The HTTP application: the routes of every API over one `AsyncLLM`, and what errors look like."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tierkv import __version__
from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import EngineDeadError, RequestError
from tierkv.server import errors
from tierkv.server.context import AppSettings, ServerContext
from tierkv.server.observability import ObservedApp
from tierkv.server.openapi import DocumentedApp
from tierkv.server.routes import (
    completions,
    dashboard,
    info,
    kv,
    kv_admin,
    kv_record,
    messages,
    metrics,
    responses,
    tokens,
)
from tierkv.server.streams import ClientGone

__all__ = ["AppSettings", "make_app"]

ROUTERS = (
    info.router,
    metrics.router,
    completions.router,
    responses.router,
    messages.router,
    tokens.router,
    kv.router,
    kv_admin.router,
)


def make_app(engine: AsyncLLM, settings: AppSettings) -> FastAPI:
    """The application; it does not end the engine."""
    context = ServerContext(engine, settings)
    app = DocumentedApp(title="tierkv", version=__version__, redoc_url=None)
    app.model_names, app.has_key = settings.model_names, not context.callers.is_open
    app.has_admin = context.callers.has_admin
    app.state.context = context
    for router in ROUTERS:
        app.include_router(router(context))
    for router in (dashboard.router, kv_record.router):
        app.include_router(router(context), include_in_schema=False)
    app.add_middleware(ObservedApp, observability=context.observability)
    for kind in (RequestError, EngineDeadError, errors.RequestTimeoutError, errors.AbortedError):
        app.add_exception_handler(kind, errors.on_error)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    for gone in (ClientGone, ClientDisconnect):
        app.add_exception_handler(gone, errors.on_client_gone)
    app.add_exception_handler(Exception, errors.on_bug)
    return app
