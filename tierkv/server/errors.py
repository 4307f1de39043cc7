"""What goes wrong, as the bodies that clients of each API expect."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tierkv.errors import EngineDeadError, QueueFullError, RequestError
from tierkv.server.replies import Json, error_body

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


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
