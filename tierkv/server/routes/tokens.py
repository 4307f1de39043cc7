"""Texts to token ids and back, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import RequestError
from tierkv.server.bodies import parse_strictly
from tierkv.server.context import ServerContext, read_body
from tierkv.server.mapped_reply import chat_reply
from tierkv.server.openapi import BODY_ERRORS, operation
from tierkv.server.schemas import Detokenized, Tokenized
from tierkv.server.tokens_body import DetokenizeBody, TokenizeBody, TokenizeChatBody, parse_tokenize


class TokenRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context, self._engine = context, context.engine

    async def tokenize(self, request: Request) -> Response:
        """The token ids that a completion or a chat completion would compute."""
        body = parse_tokenize(await read_body(request))
        model = self._context.known_model(body.model)
        tokenizer = self._tokenizer(model)
        token_ids = await self._token_ids(body, model)
        shows_texts = bool(body.return_token_strs)
        texts = tokenizer.hf.convert_ids_to_tokens(token_ids) if shows_texts else None
        return JSONResponse(
            {
                "count": len(token_ids),
                "max_model_len": self._engine.info.max_model_len,
                "tokens": token_ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens included."""
        body = parse_strictly(await read_body(request), DetokenizeBody)
        tokenizer = self._tokenizer(self._context.known_model(body.model))
        limit = self._engine.info.vocab_size
        for place, token_id in enumerate(body.tokens):
            if not 0 <= token_id < limit:
                raise RequestError(f"tokens[{place}]", token_id, f"must be in [0, {limit})")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    async def _token_ids(self, body: TokenizeBody | TokenizeChatBody, model: str) -> list[int]:
        if isinstance(body, TokenizeChatBody):
            return await chat_reply(self._context, body, model).prompt_token_ids()
        return await self._engine.tokenize(body.prompt, add_special_tokens=body.add_special_tokens)

    def _tokenizer(self, model: str) -> Tokenizer:
        if self._engine.tokenizer is None:
            raise RequestError("model", model, "has no tokenizer: its prompts are token ids")
        return self._engine.tokenizer


def router(context: ServerContext) -> APIRouter:
    """`/tokenize` and `/detokenize`."""
    routes, api = APIRouter(dependencies=[Depends(context.check_key)]), TokenRoutes(context)
    errors: dict[str, Any] = {"errors": BODY_ERRORS, "is_keyed": True}
    about = operation("vLLM", body=(TokenizeBody, TokenizeChatBody), reply=Tokenized, **errors)
    routes.add_api_route("/tokenize", api.tokenize, methods=["POST"], **about)
    about = operation("vLLM", body=DetokenizeBody, reply=Detokenized, **errors)
    routes.add_api_route("/detokenize", api.detokenize, methods=["POST"], **about)
    return routes
