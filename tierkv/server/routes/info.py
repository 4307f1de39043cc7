"""What the server is and how it is: health, version, models, load, its cache."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response

from tierkv import __version__
from tierkv.server.context import ServerContext
from tierkv.server.openapi import operation
from tierkv.server.replies import Json, error_body
from tierkv.server.schemas import Load, ModelCard, ModelList, Version


class InfoRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def health(self) -> Response:
        """200 while the engine lives, 503 after."""
        await self._context.engine.check_health()
        return Response()

    async def version(self) -> Json:
        """The version of tierkv."""
        return {"version": __version__}

    async def load(self) -> Json:
        """Sequences in flight: those that run and those that wait."""
        return {"server_load": self._context.num_sequences}

    async def models(self) -> Json:
        """The names that requests may use."""
        names = self._context.settings.model_names
        return {"object": "list", "data": [self._card(name) for name in names]}

    async def model(self, name: str) -> Json:
        """One of the names; it may hold slashes."""
        return self._card(self._context.known_model(name))

    async def reset_prefix_cache(self) -> Response:
        """Forget all cached blocks, on every tier; refused while requests hold some."""
        if await self._context.engine.reset_prefix_cache():
            return Response()
        count = self._context.num_sequences
        if count:
            fix = f"{count} sequences are in flight and hold blocks: try again when none are"
            return JSONResponse(error_body(fix, "conflict_error", None, "cache_in_use"), 409)
        fix = "blocks still move, or a disk has not confirmed that it forgot its own: see the log"
        return JSONResponse(error_body(fix, "server_error", None, "reset_unconfirmed"), 503)

    def _card(self, name: str) -> Json:
        info = self._context.engine.info
        return {
            "id": name,
            "object": "model",
            "created": self._context.created,
            "owned_by": "tierkv",
            "root": info.model,
            "parent": None,
            "max_model_len": info.max_model_len,
        }


def router(context: ServerContext) -> APIRouter:
    """`/health`, `/ping`, `/version`, `/load`, `/v1/models`, `/reset_prefix_cache`."""
    routes, api = APIRouter(), InfoRoutes(context)
    keyed = [Depends(context.check_key)]
    health = operation("server", errors=(503,))
    routes.add_api_route("/health", api.health, **health, response_class=Response)
    for method in ("GET", "POST"):
        routes.add_api_route(
            "/ping", api.health, **health, response_class=Response, methods=[method], name="ping"
        )
    routes.add_api_route("/version", api.version, **operation("server", reply=Version))
    routes.add_api_route("/load", api.load, **operation("vLLM", reply=Load))
    models = operation("OpenAI", reply=ModelList, is_keyed=True)
    routes.add_api_route("/v1/models", api.models, **models, dependencies=keyed)
    # Names may hold slashes: organisation/model.
    model = operation("OpenAI", reply=ModelCard, errors=(404,), is_keyed=True)
    routes.add_api_route("/v1/models/{name:path}", api.model, **model, dependencies=keyed)
    # Nobody may take away what others have cached.
    is_shared = bool(context.callers.tenants) or context.callers.has_admin
    routes.add_api_route(
        "/reset_prefix_cache",
        api.reset_prefix_cache,
        methods=["POST"],
        dependencies=[Depends(context.check_admin)] if is_shared else keyed,
        response_class=Response,
        **operation("vLLM", errors=(409, 503), is_keyed=True, is_admin=is_shared),
    )
    return routes
