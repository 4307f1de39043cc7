"""Server-sent events: `data: {...}`, after `event: NAME` in the APIs whose events have names.

Streams of completions end with `data: [DONE]`.
"""

from __future__ import annotations

import json
from typing import Any

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies must pass each event on at once."""

DONE = b"data: [DONE]\n\n"


def event(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One event with a JSON payload."""
    head = "" if name is None else f"event: {name}\n"
    data = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return f"{head}data: {data}\n\n".encode()
