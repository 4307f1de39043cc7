"""Anthropic's messages."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from tierkv.server.bodies import parse_strictly
from tierkv.server.context import ServerContext, read_body
from tierkv.server.mapped_reply import chat_reply, naming_fields_of
from tierkv.server.messages_body import MessagesBody, PromptBody
from tierkv.server.messages_reply import MessageReply
from tierkv.server.openapi import BODY_ERRORS, GENERATION_ERRORS, operation
from tierkv.server.schemas import AnthropicError, MessageEvent, MessageObject, TokenCount


class MessagesRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """The assistant's next message, at once or as events."""
        body = parse_strictly(await read_body(request), MessagesBody)
        model = self._context.known_model(body.model)
        return await self._context.answer(
            request,
            body,
            lambda: MessageReply(chat_reply(self._context, body, model), body, model),
            stream=bool(body.stream),
        )

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens the prompt has; nothing is generated."""
        body = parse_strictly(await read_body(request), PromptBody)
        model = self._context.known_model(body.model)
        with naming_fields_of(body):
            token_ids = await chat_reply(self._context, body, model).prompt_token_ids()
        return JSONResponse({"input_tokens": len(token_ids)})


def router(context: ServerContext) -> APIRouter:
    """`/v1/messages` and `/v1/messages/count_tokens`."""
    routes, api = APIRouter(dependencies=[Depends(context.check_key)]), MessagesRoutes(context)
    about = operation(
        "Anthropic",
        body=MessagesBody,
        reply=MessageObject,
        event=MessageEvent,
        error=AnthropicError,
        errors=GENERATION_ERRORS,
        is_keyed=True,
    )
    routes.add_api_route("/v1/messages", api.create, methods=["POST"], **about)
    about = operation(
        "Anthropic",
        body=PromptBody,
        reply=TokenCount,
        error=AnthropicError,
        errors=BODY_ERRORS,
        is_keyed=True,
    )
    routes.add_api_route("/v1/messages/count_tokens", api.count_tokens, methods=["POST"], **about)
    return routes
