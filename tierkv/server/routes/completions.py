"""OpenAI's completions and chat completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from starlette.requests import Request

from tierkv.server.context import ServerContext, read_body
from tierkv.server.generation import ChatReply, CompletionReply
from tierkv.server.openapi import GENERATION_ERRORS, operation
from tierkv.server.parsing import parse_body
from tierkv.server.protocol import ChatBody, CompletionBody
from tierkv.server.schemas import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk


class CompletionRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def completions(self, request: Request) -> Response:
        """The continuations of one or several prompts, at once or as events."""
        body = parse_body(await read_body(request), CompletionBody)
        model, engine = self._context.known_model(body.model), self._context.engine
        return await self._context.answer(
            request, body, lambda: CompletionReply(engine, body, model), stream=bool(body.stream)
        )

    async def chat(self, request: Request) -> Response:
        """The answers to a conversation, at once or as events."""
        body = parse_body(await read_body(request), ChatBody)
        model, engine = self._context.known_model(body.model), self._context.engine
        settings = self._context.settings
        return await self._context.answer(
            request,
            body,
            lambda: ChatReply(engine, body, model, settings),
            stream=bool(body.stream),
        )


def router(context: ServerContext) -> APIRouter:
    """`/v1/completions` and `/v1/chat/completions`."""
    routes, api = APIRouter(dependencies=[Depends(context.check_key)]), CompletionRoutes(context)
    about: dict[str, Any] = {"errors": GENERATION_ERRORS, "is_keyed": True, "last_event": "[DONE]"}
    completion = operation(
        "OpenAI", body=CompletionBody, reply=Completion, event=CompletionChunk, **about
    )
    routes.add_api_route("/v1/completions", api.completions, methods=["POST"], **completion)
    chat = operation(
        "OpenAI", body=ChatBody, reply=ChatCompletion, event=ChatCompletionChunk, **about
    )
    routes.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], **chat)
    return routes
