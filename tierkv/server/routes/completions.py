"""OpenAI's completions and chat completions."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from starlette.requests import Request

from tierkv.server.context import ServerContext, read_body
from tierkv.server.generation import ChatReply, CompletionReply
from tierkv.server.protocol import ChatBody, CompletionBody, parse_body


class CompletionRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def completions(self, request: Request) -> Response:
        body = parse_body(await read_body(request), CompletionBody)
        model, engine = self._context.known_model(body.model), self._context.engine
        return await self._context.answer(
            request, body, lambda: CompletionReply(engine, body, model), stream=bool(body.stream)
        )

    async def chat(self, request: Request) -> Response:
        body = parse_body(await read_body(request), ChatBody)
        model, engine = self._context.known_model(body.model), self._context.engine
        template = self._context.settings.chat_template
        return await self._context.answer(
            request,
            body,
            lambda: ChatReply(engine, body, model, template),
            stream=bool(body.stream),
        )


def router(context: ServerContext) -> APIRouter:
    """`/v1/completions` and `/v1/chat/completions`."""
    routes, api = APIRouter(dependencies=[Depends(context.check_key)]), CompletionRoutes(context)
    routes.add_api_route("/v1/completions", api.completions, methods=["POST"])
    routes.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])
    return routes
