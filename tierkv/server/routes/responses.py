"""OpenAI's responses."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from starlette.requests import Request

from tierkv.server.bodies import parse_strictly
from tierkv.server.context import ServerContext, read_body
from tierkv.server.mapped_reply import chat_reply
from tierkv.server.openapi import GENERATION_ERRORS, operation
from tierkv.server.responses_body import ResponsesBody
from tierkv.server.responses_reply import ResponseReply
from tierkv.server.schemas import ResponseEvent, ResponseObject


class ResponsesRoutes:
    """The handler, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """A response to the input, at once or as events."""
        body = parse_strictly(await read_body(request), ResponsesBody)
        model = self._context.known_model(body.model)
        return await self._context.answer(
            request,
            body,
            lambda: ResponseReply(chat_reply(self._context, body, model), body, model),
            stream=bool(body.stream),
        )


def router(context: ServerContext) -> APIRouter:
    """`/v1/responses`."""
    routes, api = APIRouter(dependencies=[Depends(context.check_key)]), ResponsesRoutes(context)
    about = operation(
        "OpenAI",
        body=ResponsesBody,
        reply=ResponseObject,
        event=ResponseEvent,
        errors=GENERATION_ERRORS,
        is_keyed=True,
    )
    routes.add_api_route("/v1/responses", api.create, methods=["POST"], **about)
    return routes
