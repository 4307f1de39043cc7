"""One look at the engine for all who watch.

While anybody does, the engine is asked for a snapshot a quarter of a second after the last one
came; each is encoded once and sent to everybody. A watcher that is slow misses some. When nobody
watches, nothing is asked.

Events are JSON objects with a `type`: `hello` comes first and says what does not change, `snapshot`
is one look, `end` says why no more come. Comments in between say that the server is still there.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from tierkv import __version__
from tierkv.engine.async_llm import AsyncLLM
from tierkv.engine.cells import LEVELS
from tierkv.engine.observe import ROW
from tierkv.errors import EngineDeadError
from tierkv.server import sse
from tierkv.server.feed_rates import SAMPLE, Rates, Snapshot
from tierkv.server.replies import Json

logger = logging.getLogger(__name__)

PERIOD_S = 0.25
HEARTBEAT_S = 2.0
MOST_WATCHERS = 64
HEARTBEAT = b": still here\n\n"


class _Watcher:
    """The mailbox of one connection: it holds the latest event only."""

    def __init__(self) -> None:
        self._event: bytes | None = None
        self._has_news = asyncio.Event()
        self.is_over = False

    def put(self, event: bytes, *, is_last: bool = False) -> None:
        self._event, self.is_over = event, is_last
        self._has_news.set()

    async def next(self) -> bytes:
        """The next event; after a while without one, a heartbeat."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._has_news.wait()
        except TimeoutError:
            return HEARTBEAT
        self._has_news.clear()
        assert self._event is not None
        return self._event


class Feed:
    """Snapshots of one engine, as server-sent events.

    Args:
        engine: whose.
        model_name: how clients call the model.
        is_exiting: whether the server is about to end; streams that would never end then do.
    """

    def __init__(self, engine: AsyncLLM, model_name: str, is_exiting: Callable[[], bool]) -> None:
        self._engine = engine
        self._model_name = model_name
        self._is_exiting = is_exiting
        self._watchers: set[_Watcher] = set()
        self._rates = Rates()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        return len(self._watchers) >= MOST_WATCHERS

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Events until the server ends, or the reader leaves."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            yield sse.event(self._hello())
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._look())
            is_over = False
            while not is_over:
                if self._is_exiting():
                    self._stop()
                event = await watcher.next()
                is_over = watcher.is_over and event is not HEARTBEAT
                yield event
        finally:
            self._watchers.discard(watcher)

    async def _look(self) -> None:
        """Ask, send, sleep; until nobody watches."""
        self._rates.restart()
        try:
            while self._watchers and not self._is_exiting():
                snapshot = await self._engine.snapshot()
                self._send(sse.event(self._payload(snapshot)))
                await asyncio.sleep(PERIOD_S)
            self._stop()
        except EngineDeadError as error:
            self._send(_end(str(error)), is_last=True)
        except Exception:
            logger.exception("watching the engine failed")
            self._send(_end("the server failed to watch its engine; see its log"), is_last=True)

    def _stop(self) -> None:
        self._send(_end("the server is stopping"), is_last=True)

    def _send(self, event: bytes, *, is_last: bool = False) -> None:
        for watcher in self._watchers:
            watcher.put(event, is_last=is_last)

    def _hello(self) -> Json:
        info = self._engine.info
        return {
            "type": "hello",
            "version": __version__,
            "model": self._model_name,
            "dtype": info.dtype,
            "device": info.device,
            "block_size": info.block_size,
            "max_model_len": info.max_model_len,
            "period_s": PERIOD_S,
            "row": ROW,
            "sample": SAMPLE,
            "levels": LEVELS,
            "history": list(self._rates.history),
        }

    def _payload(self, snapshot: Snapshot) -> Json:
        """A snapshot with speeds, as JSON can hold it."""
        found = self._rates.add(snapshot)
        speeds: dict[tuple[str, str], float] = found["speeds"]["links"]
        rows = [[*row[:-2], round(row[-2], 2), row[-1]] for row in snapshot["rows"]]
        return {
            **snapshot,
            "type": "snapshot",
            "tiers": [_with_text(tier) for tier in snapshot["tiers"]],
            "links": [_link(link, speeds) for link in snapshot["links"]],
            "sample": found["sample"],
            "rows": rows,
        }


def _with_text(tier: dict[str, Any]) -> Json:
    packed = {name: base64.b64encode(tier[name]).decode() for name in ("cells", "owners")}
    return {**tier, **packed}


def _link(link: list[Any], speeds: dict[tuple[str, str], float]) -> Json:
    source, destination, num_moves, num_bytes, num_failures, in_flight = link
    return {
        "source": source,
        "destination": destination,
        "moves": num_moves,
        "bytes": num_bytes,
        "failures": num_failures,
        "in_flight_bytes": in_flight,
        "bytes_per_s": round(speeds.get((source, destination), 0.0)),
    }


def _end(reason: str) -> bytes:
    return sse.event({"type": "end", "reason": reason})
