"""What a request may say of its own KV, and that it crosses the process border."""

from __future__ import annotations

from typing import Any

import pytest

from tierkv.engine import wire
from tierkv.engine.core import EngineRequest
from tierkv.engine.kv_hints import KvHints, parse_each
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.sessions import Sessions
from tierkv.errors import RequestError

ALL: dict[str, Any] = {
    "ttl": 2.5,
    "priority": -3,
    "no_store": True,
    "session_id": "größe",
    "turn": "tool_call",
}


@pytest.mark.parametrize("hints", [None, KvHints(**ALL), KvHints(ttl=0)])
def test_a_request_arrives_as_it_was_sent(hints: KvHints | None) -> None:
    sent = EngineRequest("r", [1, 2], SamplingParams(), 7, "salt", tenant="t", hints=hints)
    _, (packed,) = wire.unpack(wire.pack("add", wire.encode_request(sent)))
    assert wire.decode_request(packed) == sent


def test_what_says_nothing_is_nothing() -> None:
    for nothing in (None, {}, {"ttl": None, "session_id": None}, {"priority": 0, "turn": ""}):
        assert KvHints.parse(nothing) is None
    assert KvHints.parse(ALL) == KvHints(**ALL)
    assert KvHints.parse({"ttl": 0}) == KvHints(ttl=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ttl", -1),
        ("ttl", float("nan")),
        ("ttl", float("inf")),
        ("ttl", "3"),
        ("ttl", 10**400),
        ("ttl", True),
        ("priority", 101),
        ("priority", 1.0),
        ("priority", True),
        ("no_store", 1),
        ("session_id", 7),
        ("session_id", "x" * 257),
        ("session_id", "\ud800"),
        ("turn", "over"),
        ("trun", "end"),
    ],
)
def test_bad_hints_are_named(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        KvHints.parse({field: value})
    assert caught.value.field == f"kv_hints.{field}"


def test_hints_are_an_object() -> None:
    with pytest.raises(RequestError, match="must be an object"):
        KvHints.parse("end")  # type: ignore[arg-type]


def test_one_for_all_or_one_for_each() -> None:
    one = KvHints(ttl=1)
    assert parse_each(None, 2) == [None, None]
    assert parse_each({"ttl": 1}, 2) == [one, one]
    assert parse_each([{"ttl": 1}, None], 2) == [one, None]
    with pytest.raises(RequestError, match="3 were given for 2"):
        parse_each([None] * 3, 2)


# -- sessions --------------------------------------------------------------------------------------


def keys(count: int) -> list[bytes]:
    return [bytes([i]) * 16 for i in range(count)]


def test_a_session_is_its_last_request() -> None:
    sessions = Sessions()
    assert [sessions.begun("t", "s") for _ in range(3)] == [1, 2, 3]
    sessions.ended("t", "s", "salt", keys(3))
    sessions.ended("t", "s", "salt", keys(2))
    found = sessions.find("t", "s")
    assert found is not None and (found.salt, found.keys) == ("salt", keys(2))
    assert sessions.find("other", "s") is None


def test_the_least_used_sessions_are_forgotten() -> None:
    sessions = Sessions(most_keys=10)
    for name in "abc":
        sessions.begun("", name)
        sessions.ended("", name, "", keys(3))
    sessions.begun("", "a")
    sessions.begun("", "d")
    sessions.ended("", "d", "", keys(4))
    assert sessions.find("", "b") is None
    assert sessions.find("", "a") is not None
    assert len(sessions) == 3


def test_a_flood_of_one_tenant_makes_no_other_be_forgotten() -> None:
    sessions = Sessions(most_keys=20, most_sessions=10)
    for tenant in ("a", "b"):
        sessions.begun(tenant, "s")
        sessions.ended(tenant, "s", "", keys(3))
    for number in range(50):
        sessions.begun("b", f"many {number}")
    assert len(sessions) == 10 and (sessions.count("a"), sessions.count("b")) == (1, 9)
    for number in range(50):
        sessions.ended("b", f"large {number}", "", keys(8))
        assert sessions.find("a", "s") is not None
    assert sessions.find("b", "large 49") is not None
    assert (sessions.count("a"), sessions.count("nobody")) == (1, 0)


def test_one_session_may_be_too_large() -> None:
    sessions = Sessions(most_keys=4)
    sessions.ended("", "a", "", keys(5))
    assert len(sessions) == 0
    sessions.ended("", "b", "", keys(4))
    assert sessions.find("", "b") is not None
