"""Log lines for people or, as one JSON object a line, for machines; with the request's id.

Libraries only log; `configure` is for programs: the server and its engine process. Fields that a
call gives as `extra={"fields": {...}}` become `name=value` at the end of a text line and keys of a
JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("text", "json")

ANNOUNCER = "tierkv.serve"
"""The logger of what a command says to whoever started it; it goes to standard output."""

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the HTTP request that the current task serves."""


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO tierkv.access: message name=value request_id=...`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name == ANNOUNCER:
            return f"tierkv: {record.message}"
        words = [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        return " ".join([super().formatMessage(record), *words])


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, request_id, the call's fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class Standard(logging.Handler):
    """Writes to what is standard output or standard error at the time.

    Args:
        name: `stdout` or `stderr`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._stream_name = name

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream: TextIO = getattr(sys, self._stream_name)
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:  # as in logging.StreamHandler: a full disk must not end the program
            self.handleError(record)


def configure(form: str, *, server_level: str = "warning") -> None:
    """Let this process's log lines go to standard error, its announcements to standard output.

    Args:
        form: how a line looks, one of `FORMATS`.
        server_level: the level of uvicorn's loggers.
    """
    logging.captureWarnings(form == "json")
    _handle("", "stderr", form)
    _handle(ANNOUNCER, "stdout", form)
    logging.getLogger(ANNOUNCER).setLevel(logging.INFO)
    logging.getLogger(ANNOUNCER).propagate = False
    logging.getLogger("tierkv.access").setLevel(logging.INFO)
    # uvicorn's "trace" is below what `logging` knows.
    level = 5 if server_level == "trace" else server_level.upper()
    logging.getLogger("uvicorn").setLevel(level)


def _handle(name: str, stream: str, form: str) -> None:
    handler, logger = Standard(stream), logging.getLogger(name)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for former in [h for h in logger.handlers if isinstance(h, Standard)]:
        logger.removeHandler(former)
    logger.addHandler(handler)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    if identity := request_id.get():
        fields.setdefault("request_id", identity)
    return fields


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    is_word = text.isprintable() and text and not {" ", '"'} & set(text)
    return text if is_word else json.dumps(text)
