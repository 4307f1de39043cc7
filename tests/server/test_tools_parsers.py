"""Text becomes calls, however it is cut into pieces; what is no call stays text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.server.tools_parsers import (
    PARSERS,
    CallParser,
    HermesParser,
    ListParser,
    NamedParser,
    PythonicParser,
)

NAMES = frozenset({"f", "get_weather", "a.b-c"})
Found = tuple[str, list[tuple[str, str]]]


def hermes() -> CallParser:
    return HermesParser(NAMES)


def pythonic() -> CallParser:
    return PythonicParser(NAMES)


def read(make: Callable[[], CallParser], text: str, cuts: list[int]) -> Found:
    """Text and calls, when the text comes in pieces that begin at `cuts`."""
    parser, pieces = make(), []
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(places):
        pieces += parser.push(text[start:end])
    pieces += parser.finish()
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        if not isinstance(piece, str):
            assert (piece.index in calls) == (piece.name is None)  # the name comes first, and once
            call = calls.setdefault(piece.index, [piece.name or "", ""])
            call[1] += piece.arguments
    assert list(calls) == list(range(len(calls)))
    shown = "".join(piece for piece in pieces if isinstance(piece, str))
    return shown, [(name, arguments) for name, arguments in calls.values()]


CASES: list[tuple[Callable[[], CallParser], str, Found]] = [
    (hermes, "plain < b <tool <tool_cal x \n", ("plain < b <tool <tool_cal x \n", [])),
    (
        hermes,
        'Hi.\n<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>\\"}"}}\n</tool_call>\n',
        ("Hi.", [("f", '{"a": "</tool_call>\\"}"}')]),
    ),
    (
        hermes,
        '<tool_call>{"arguments": {"b": [1, {"c": -2.5e3}]}, "id": "1", "name": "a.b-c"}'
        '</tool_call>\n<tool_call>{"name": "f", "parameters": {}}</tool_call>then',
        ("then", [("a.b-c", '{"b": [1, {"c": -2.5e3}]}'), ("f", "{}")]),
    ),
    (hermes, '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    (hermes, '<tool_call>{"name":"f","arguments":null}</tool_call>', ("", [("f", "{}")])),
    (
        hermes,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", [("f", '{"a": 1}')]),
    ),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a": 1', ("", [("f", '{"a": 1')])),
    (hermes, '<tool_call>{"na', ('<tool_call>{"na', [])),
    (hermes, "<tool_call>no</tool_call> x", ("<tool_call>no</tool_call> x", [])),
    (hermes, '<tool_call>{"name": "g"}</tool_call>', ('<tool_call>{"name": "g"}</tool_call>', [])),
    (hermes, '<tool_call>{"a": 1}</tool_call>', ('<tool_call>{"a": 1}</tool_call>', [])),
    (hermes, '<tool_call>{"name": "f"} no tag', ("no tag", [("f", "{}")])),
    (
        hermes,
        '<tool_call>{"name": "f", "arguments": {"a": <x>}}</tool_call>ok',
        ("ok", [("f", '{"a": <')]),
    ),
    (pythonic, "[1] As Knuth wrote", ("[1] As Knuth wrote", [])),
    (pythonic, "no", ("no", [])),
    (pythonic, "[]", ("[]", [])),
    (pythonic, "[f", ("[f", [])),
    (pythonic, "[f(a=1", ("[f(a=1", [])),
    (pythonic, "[f(1)]", ("[f(1)]", [])),
    (pythonic, "[f(a=x)]", ("[f(a=x)]", [])),
    (pythonic, "[f(**x)]", ("[f(**x)]", [])),
    (pythonic, "[f(a={1: 2})]", ("[f(a={1: 2})]", [])),
    (pythonic, "[g(a=1)]", ("[g(a=1)]", [])),
    (pythonic, "f(a=1)", ("f(a=1)", [])),
    (pythonic, "[f(a=')", ("[f(a=')", [])),
    (pythonic, "  [ f (a=1) ]\n", ("", [("f", '{"a": 1}')])),
    (pythonic, "[f(), f(a=1)] ok \n", ("ok \n", [("f", "{}"), ("f", '{"a": 1}')])),
    (pythonic, "[f(a=1), 5]", ("5]", [("f", '{"a": 1}')])),
    (
        pythonic,
        "[f(a='it\\'s [)', b=(1, -2.5), c={'k': [None, true]}), get_weather(city=\"Köln\")]",
        (
            "",
            [
                ("f", '{"a": "it\'s [)", "b": [1, -2.5], "c": {"k": [null, true]}}'),
                ("get_weather", '{"city": "Köln"}'),
            ],
        ),
    ),
    (
        ListParser,
        '[{"name": "f", "arguments": {"a": 1}}, {"name": "a.b-c", "arguments": {}}]',
        ("", [("f", '{"a": 1}'), ("a.b-c", "{}")]),
    ),
    (ListParser, '[{"name": "f", "arguments": {"a": [', ("", [("f", '{"a": [')])),
    (lambda: NamedParser("f"), '{"a": 1}', ("", [("f", '{"a": 1}')])),
]


@pytest.mark.parametrize(("make", "text", "expected"), CASES)
def test_at_once_and_character_by_character(
    make: Callable[[], CallParser], text: str, expected: Found
) -> None:
    assert read(make, text, []) == expected
    assert read(make, text, list(range(len(text)))) == expected


@given(st.sampled_from(CASES), st.lists(st.integers(1, 120), max_size=8))
def test_any_pieces_tell_the_same(case: Any, cuts: list[int]) -> None:
    make, text, expected = case
    assert read(make, text, cuts) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
arguments_of_calls = st.dictionaries(st.from_regex(r"[a-z]{1,4}_", fullmatch=True), json_values)
calls_of_answers = st.lists(
    st.tuples(st.sampled_from(["f", "get_weather"]), arguments_of_calls), min_size=1, max_size=3
)
cut_places = st.lists(st.integers(1, 300), max_size=6)


@given(calls_of_answers, cut_places, st.booleans())
def test_any_arguments_come_through_hermes(
    calls: list[tuple[str, dict[str, Any]]], cuts: list[int], ascii_only: bool
) -> None:
    objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
    texts = [json.dumps(each, ensure_ascii=ascii_only) for each in objects]
    text = "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in texts)
    shown, found = read(hermes, f"Well: {text}", cuts)
    assert shown == "Well:"
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    listed = read(ListParser, f"[{', '.join(texts)}]", cuts)
    assert [(name, json.loads(arguments)) for name, arguments in listed[1]] == calls


@given(calls_of_answers, cut_places)
def test_any_arguments_come_through_python(
    calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    shown, found = read(pythonic, f"[{', '.join(written)}]", cuts)
    assert shown == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(st.text(alphabet='<tool_call>/{}[]"\\: f(a=1),\n', max_size=60), cut_places)
def test_anything_is_read_alike_in_all_pieces(text: str, cuts: list[int]) -> None:
    for make in PARSERS.values():
        whole = read(lambda make=make: make(NAMES), text, [])  # type: ignore[misc]
        assert read(lambda make=make: make(NAMES), text, cuts) == whole  # type: ignore[misc]


def test_long_arguments_take_linear_time() -> None:
    """In pieces of a few characters, as tokens come."""
    value = "x" * 200_000
    texts = {
        "hermes": f'<tool_call>{{"name": "f", "arguments": {{"a": "{value}"}}}}</tool_call>',
        "pythonic": f'[f(a="{value}")]',
    }
    for name, text in texts.items():
        _, ((_, arguments),) = read(
            lambda n=name: PARSERS[n](NAMES), text, list(range(0, 210_000, 4))
        )  # type: ignore[misc]
        assert json.loads(arguments) == {"a": value}
