"""A recording of what requests come (`tierkv/engine/recording.py`), as JSON lines.

Lines are objects with a `type`: `start` comes first, with the size of a block; `request` is one
that ended; `mark` says that none that arrived before `until_s` is still to come, how many of the
recording's requests run, and how many were dropped for want of room; `end` says why no more come.
A recording ends with its reader.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from tierkv.engine.async_llm import AsyncLLM
from tierkv.errors import EngineDeadError, NotFoundError

MEDIA_TYPE = "application/jsonl"
PERIOD_S = 0.5

_tasks: set[asyncio.Task[None]] = set()


async def lines(engine: AsyncLLM, is_exiting: Callable[[], bool]) -> AsyncGenerator[bytes, None]:
    """Lines until the server ends, or the reader leaves.

    Raises (before the first line):
        ConflictError: another recording is going on.
    """
    started = await engine.kv("record_start")
    name = started["recording"]
    try:
        yield _line("start", {"block_size": started["block_size"]})
        while not is_exiting():
            found = await engine.kv("record_take", name)
            for record in found["records"]:
                yield _line("request", record | {"blocks": record["blocks"].hex()})
            mark = {key: found[key] for key in ("until_s", "dropped", "running")}
            yield _line("mark", mark)
            if not found["has_more"]:
                await asyncio.sleep(PERIOD_S)
        yield _line("end", {"reason": "the server is stopping"})
    except (EngineDeadError, NotFoundError) as error:
        yield _line("end", {"reason": str(error)})
    finally:
        # The reader may have gone, and this be cancelled: what ends the recording must not be.
        task = asyncio.create_task(_stop(engine, name))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)


async def _stop(engine: AsyncLLM, name: str) -> None:
    with suppress(EngineDeadError, NotFoundError):
        await engine.kv("record_stop", name)


def _line(kind: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, **fields}, separators=(",", ":")).encode() + b"\n"
