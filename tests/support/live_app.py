"""The HTTP application on a real engine, with the engine within the test's reach."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from tierkv.engine.async_llm import AsyncLLM
from tierkv.server.app import AppSettings, make_app
from tierkv.server.run import bind, url_of

PATIENCE_S = 300


class LiveApp:
    """A served application: its address, its clients, and its engine."""

    def __init__(self, url: str, engine: AsyncLLM, api_key: str) -> None:
        self.url, self.engine, self.api_key = url, engine, api_key
        headers = {"Authorization": f"Bearer {api_key}"}
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S, headers=headers)
        self.openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_S
        )

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json=fields)

    def metrics(self) -> dict[str, Any]:
        return asyncio.run(self.engine.metrics())

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The engine's metrics as soon as they meet the condition."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(found := self.metrics()):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found


@contextmanager
def live_app(directory: Path, settings: AppSettings, **options: Any) -> Iterator[LiveApp]:
    """Serve the model in `directory` on a thread; everything is gone afterwards."""
    engine = AsyncLLM.from_options(model=str(directory), **options)
    try:
        with served(engine, settings) as app:
            yield app
    finally:
        engine.shutdown()


@contextmanager
def served(engine: AsyncLLM, settings: AppSettings) -> Iterator[LiveApp]:
    """An application over `engine`, on a thread; the engine's former one goes on afterwards."""
    former_watch = engine.make_watch
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(make_app(engine, settings), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    app = LiveApp(url_of(listener), engine, settings.api_key or "none")
    try:
        while not server.started:
            time.sleep(0.01)
        yield app
    finally:
        app.http.close()
        app.openai.close()
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        engine.make_watch = former_watch
