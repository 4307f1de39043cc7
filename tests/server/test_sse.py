from __future__ import annotations

import json

from tierkv.server import sse


def test_an_event_is_one_line_of_json() -> None:
    payload = {"text": 'two\nlines, a quote " and \u00e9\u2028'}
    event = sse.event(payload).decode()
    assert event.startswith("data: ") and event.endswith("\n\n")
    assert "\n" not in event[:-2]
    assert json.loads(event[len("data: ") :]) == payload
