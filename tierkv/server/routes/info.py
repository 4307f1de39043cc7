"""What the server is: health, version, models."""

from __future__ import annotations

import importlib.metadata

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from tierkv.server.context import ServerContext
from tierkv.server.replies import Json


class InfoRoutes:
    """The handlers, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def health(self) -> Response:
        """200 while the engine lives, 503 after."""
        await self._context.engine.check_health()
        return Response()

    async def version(self) -> Json:
        return {"version": importlib.metadata.version("tierkv")}

    async def models(self) -> Json:
        names = self._context.settings.model_names
        return {"object": "list", "data": [self._card(name) for name in names]}

    async def model(self, name: str) -> Json:
        return self._card(self._context.known_model(name))

    def _card(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._context.created,
            "owned_by": "tierkv",
            "max_model_len": self._context.engine.info.max_model_len,
        }


def router(context: ServerContext) -> APIRouter:
    """`/health`, `/version`, `/v1/models`."""
    routes, api = APIRouter(), InfoRoutes(context)
    keyed = [Depends(context.check_key)]
    routes.add_api_route("/health", api.health)
    routes.add_api_route("/version", api.version)
    routes.add_api_route("/v1/models", api.models, dependencies=keyed)
    # Names may hold slashes: organisation/model.
    routes.add_api_route("/v1/models/{name:path}", api.model, dependencies=keyed)
    return routes
