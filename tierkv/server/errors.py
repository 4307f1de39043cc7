"""What goes wrong, as the bodies that clients of each API expect."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tierkv import logs
from tierkv.errors import (
    ConflictError,
    EngineDeadError,
    NotFoundError,
    QueueFullError,
    RequestError,
    TierkvError,
)
from tierkv.server.replies import Json, error_body

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it
RETRY_AFTER_S = 1
REQUEST_ID_HEADER = "X-Request-Id"

ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's words for what went wrong, by status."""


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


class RequestTimeoutError(TierkvError):
    """The request took longer than `--request-timeout` allows, and was aborted."""


class AbortedError(TierkvError):
    """The server ended the request, in an API that has no other word for it."""


def describe_error(error: Exception) -> tuple[int, Json]:
    """Status and body for an error that is the client's or the engine's."""
    if isinstance(error, UnknownModelError):
        return 404, error_body(str(error), "invalid_request_error", "model", "model_not_found")
    if isinstance(error, QueueFullError):
        return 503, error_body(str(error), "server_error", None, "queue_full")
    if isinstance(error, ConflictError):
        return 409, error_body(str(error), "invalid_request_error", error.field, "conflict")
    if isinstance(error, NotFoundError):
        return 404, error_body(str(error), "invalid_request_error", error.field, "not_found")
    if isinstance(error, RequestError):
        return 400, error_body(str(error), "invalid_request_error", error.field, None)
    if isinstance(error, EngineDeadError):
        return 503, error_body(str(error), "server_error", None, "engine_dead")
    if isinstance(error, RequestTimeoutError):
        return 504, error_body(str(error), "timeout_error", None, "request_timeout")
    if isinstance(error, AbortedError):
        return 503, error_body(str(error), "server_error", None, "aborted")
    raise error


def error_response(
    request: Request, status: int, body: Json, headers: Mapping[str, str] | None = None
) -> Response:
    """The response for an error in OpenAI's form, in that of the API that was asked."""
    is_anthropic = request.url.path.startswith(ANTHROPIC_PATH)
    shown = anthropic_body(status, body) if is_anthropic else body
    return JSONResponse(shown, status, headers=headers)


def anthropic_body(status: int, body: Json) -> Json:
    """Anthropic's error body for one of OpenAI's; the message names the field."""
    kind = ANTHROPIC_KINDS.get(status, "api_error")
    error = {"type": kind, "message": body["error"]["message"]}
    return {"type": "error", "error": error, "request_id": logs.request_id.get() or None}


async def on_error(request: Request, error: Exception) -> Response:
    status, body = describe_error(error)
    return error_response(request, status, body, headers_of(error))


def headers_of(error: Exception) -> dict[str, str] | None:
    """Headers of the response for an error: when it is worth trying again."""
    return {"Retry-After": str(RETRY_AFTER_S)} if isinstance(error, QueueFullError) else None


async def on_validation_error(request: Request, error: Exception) -> Response:
    """A parameter of the path or the query, which FastAPI checks."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    is_missing = first["type"] == "missing"
    fix = (
        "is required" if is_missing else f"must be {first['msg'].removeprefix('Input should be ')}"
    )
    return await on_error(request, RequestError(name, None if is_missing else first["input"], fix))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Wrong paths, methods and keys."""
    assert isinstance(error, HTTPException)
    code = "invalid_api_key" if error.status_code == 401 else None
    body = error_body(error.detail, "invalid_request_error", None, code)
    return error_response(request, error.status_code, body, error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the server logs the traceback after this."""
    body = error_body(f"internal error: {type(error).__name__}", "server_error", None, None)
    # The connection ends with it; a client that was not told would send its next request there.
    headers = {"Connection": "close"}
    if identity := logs.request_id.get():
        headers[REQUEST_ID_HEADER] = identity  # what adds it to other responses sees only the error
    return error_response(request, 500, body, headers)


async def on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
