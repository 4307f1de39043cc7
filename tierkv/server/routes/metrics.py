"""`/metrics`: what Prometheus scrapes."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from tierkv.server.context import ServerContext
from tierkv.server.openapi import operation


class MetricsRoutes:
    """The handler, over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._observability = context.observability

    async def metrics(self, request: Request) -> Response:
        """All metrics; those of the engine as last known when it does not answer in time."""
        await self._observability.engine_values.refresh()
        page, content_type = self._observability.metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})


def router(context: ServerContext) -> APIRouter:
    """`/metrics`; no key, as monitoring has none."""
    routes = APIRouter()
    page = MetricsRoutes(context).metrics
    routes.add_api_route("/metrics", page, **operation("server"), response_class=Response)
    return routes
