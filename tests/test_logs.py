"""Log lines: for people and for machines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tierkv import logs


@pytest.fixture
def as_they_were() -> Iterator[None]:
    """The root logger and the announcer are left as they were found."""
    loggers = [logging.getLogger(name) for name in ("", logs.ANNOUNCER)]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, handlers, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
    logging.captureWarnings(False)


def record(message: str, *args: Any, name: str = "tierkv.x", **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.WARNING, __file__, 1, message, args, None)
    made.fields = fields
    return made


def in_json(made: logging.LogRecord) -> dict[str, Any]:
    line = logs.JsonFormatter().format(made)
    assert "\n" not in line
    entry: dict[str, Any] = json.loads(line)
    return entry


def test_a_json_line_has_the_call_s_fields() -> None:
    entry = in_json(record("%s of %d", "one", 2, status=200, path="/a\nb"))
    assert entry["message"] == "one of 2"
    assert (entry["level"], entry["logger"]) == ("warning", "tierkv.x")
    assert (entry["status"], entry["path"]) == (200, "/a\nb")
    assert entry["time"].endswith("+00:00")


def test_the_request_id_is_added_where_there_is_one() -> None:
    assert "request_id" not in in_json(record("x"))
    token = logs.request_id.set("abc")
    try:
        assert in_json(record("x"))["request_id"] == "abc"
        assert (
            logs.TextFormatter().format(record("x")).endswith("WARNING tierkv.x: x request_id=abc")
        )
    finally:
        logs.request_id.reset(token)


def test_a_traceback_is_one_field() -> None:
    made = record("failed")
    try:
        raise ZeroDivisionError("zero")
    except ZeroDivisionError:
        made.exc_info = sys.exc_info()
    assert "ZeroDivisionError: zero" in in_json(made)["exception"]


def test_a_text_line_cannot_be_forged() -> None:
    line = logs.TextFormatter().format(record("x", path="/a\nINFO forged", seconds=0.123456))
    assert line.endswith('x path="/a\\nINFO forged" seconds=0.1235')
    assert "\n" not in line


@pytest.mark.parametrize("form", logs.FORMATS)
def test_announcements_go_to_standard_output(
    form: str, capsys: pytest.CaptureFixture[str], as_they_were: None
) -> None:
    logs.configure(form)
    logs.configure(form)  # again: no line comes twice
    logging.getLogger(logs.ANNOUNCER).info("ready")
    logging.getLogger("tierkv.x").warning("careful")
    logging.getLogger("tierkv.x").info("not shown")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(err.splitlines()) == 1
    if form == "json":
        assert json.loads(out)["message"] == "ready"
        assert json.loads(err)["message"] == "careful"
    else:
        assert out == "tierkv: ready\n"
        assert err.endswith("WARNING tierkv.x: careful\n")
