"""A thousand requests that are wrong: each is refused by name, and the server serves on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from live_app import LiveApp

COUNT = 1000
SEED = 20
MEBIBYTE = 2**20

MESSAGES = [{"role": "user", "content": "hello"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "hello", "max_tokens": 1},
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"model": "tiny", "input": "hello", "max_output_tokens": 1},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": MESSAGES},
    "/tokenize": {"model": "tiny", "prompt": "hello"},
    "/detokenize": {"model": "tiny", "tokens": [1, 2]},
}
SAMPLED = list(GOOD)[:4]
"""Endpoints that generate."""


@dataclass
class Bad:
    """A request that must be refused.

    Attributes:
        names: one of these must be in the message.
    """

    path: str
    body: bytes
    names: tuple[str, ...] = ("body",)
    method: str = "POST"
    content_type: str = "application/json"
    statuses: tuple[int, ...] = (400,)


def dump(values: Any) -> bytes:
    return json.dumps(values).encode()


class Maker:
    """Makes bad requests out of good ones, by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kinds = [
            self.broken_json,
            self.no_object,
            self.no_utf8,
            self.wrong_type,
            self.missing_field,
            self.unknown_field,
            self.unknown_model,
            self.huge_number,
            self.deep_nesting,
            self.half_a_character,
            self.wrong_method,
            self.wrong_content_type,
            self.wrong_path,
            self.bad_value,
            self.bad_piece,
            self.bad_tool,
        ]

    def requests(self, count: int) -> Iterator[Bad]:
        for number in range(count):
            yield self.kinds[number % len(self.kinds)]()

    def path(self) -> str:
        return self.random.choice(list(GOOD))

    def broken_json(self) -> Bad:
        path = self.path()
        raw = dump(GOOD[path])
        cut = self.random.randrange(len(raw))
        breaks = [
            raw[:cut],
            raw + self.random.choice([b"}", b",", b"x", b"{}"]),
            raw.replace(b'"', b"'"),
            raw[:-1] + b',"x": ' + self.random.choice([b"NaN", b"Infinity", b"01", b"+1"]) + b"}",
            raw[:-1] + b",}",
        ]
        return Bad(path, self.random.choice(breaks))

    def no_object(self) -> Bad:
        values: list[Any] = [None, 1, "text", [], [GOOD["/v1/completions"]], True, 1.5]
        return Bad(self.path(), dump(self.random.choice(values)))

    def no_utf8(self) -> Bad:
        path = self.path()
        raw = dump(GOOD[path]).replace(b"tiny", self.random.choice([b"\xff", b"\xc3(", b"\x80"]))
        return Bad(path, raw)

    def half_a_character(self) -> Bad:
        path = self.path()
        half = self.random.choice([b"\\ud800", b"\\udfff", b"x\\uD8FFy"])
        return Bad(path, dump(GOOD[path]).replace(b"tiny", half))

    def wrong_type(self) -> Bad:
        path = self.path()
        name = self.random.choice(list(GOOD[path]))
        wrong: list[Any] = [{"x": 1}, [[["x"]]], True, 1.5]
        if name in ("max_tokens", "max_output_tokens", "tokens", "messages"):
            wrong += ["12", "x"]
        return self.with_field(path, name, self.random.choice(wrong))

    def missing_field(self) -> Bad:
        path = self.path()
        needed = {
            "prompt": ("prompt", "messages"),
            "messages": ("messages",),
            "input": ("input",),
            "tokens": ("tokens",),
        }
        (name,) = needed.keys() & GOOD[path].keys()
        values = {key: value for key, value in GOOD[path].items() if key != name}
        return Bad(path, dump(values), needed[name])

    def unknown_field(self) -> Bad:
        name = "".join(self.random.choices("abcdefghij_", k=self.random.randint(1, 30)))
        name = self.random.choice([f"{name}_", f"<{name}>", f"{name}[0]", "\x00", "__class__"])
        return self.with_field(self.path(), name, self.random.choice([1, "x", [1], {}]))

    def unknown_model(self) -> Bad:
        name = self.random.choice(["gpt-9", "", "tiny2", "TINY", "../tiny", "\x00", "x" * 5000])
        bad = self.with_field(self.path(), "model", name)
        return Bad(bad.path, bad.body, ("model",), statuses=(404,))

    def huge_number(self) -> Bad:
        path = self.random.choice(SAMPLED)
        limits = {"/v1/responses": "max_output_tokens"}
        names = ("temperature", "top_k", "seed", "min_tokens", "priority", "top_p")
        name = self.random.choice([limits.get(path, "max_tokens"), *names])
        raw = dump({**GOOD[path], name: 123454321})
        number = self.random.choice([b"1e400", b"-1e400", b"9" * 400, b"-" + b"9" * 4000])
        return Bad(path, raw.replace(b"123454321", number), (name,))

    def deep_nesting(self) -> Bad:
        path = self.path()
        depth = self.random.choice([101, 150, 500, 900, 960, 980, 1000, 5000, 100_000])
        opening, closing = self.random.choice([(b"[", b"]"), (b'{"a":', b"}")])
        raw = dump({**GOOD[path], "chat_template_kwargs": 123454321})
        deep = opening * depth + b"1" + closing * depth
        return Bad(path, raw.replace(b"123454321", deep))

    def wrong_method(self) -> Bad:
        method = self.random.choice(["GET", "PUT", "DELETE", "PATCH"])
        path = self.random.choice([*GOOD, "/v1/models", "/health", "/openapi.json"])
        if method == "GET" and path not in GOOD:
            method = "POST"
        return Bad(path, dump({}), ("Method",), method, statuses=(405,))

    def wrong_path(self) -> Bad:
        path = self.random.choice(["/v1", "/v2/completions", "/v1/completions/x", "/v1/messages/x"])
        return Bad(path, dump({}), ("Not Found",), statuses=(404,))

    def wrong_content_type(self) -> Bad:
        kinds = ["text/plain", "application/x-www-form-urlencoded", "x", "multipart/form-data"]
        path, kind = self.path(), self.random.choice(kinds)
        return Bad(path, dump(GOOD[path]), ("Content-Type",), "POST", kind, (415,))

    def bad_value(self) -> Bad:
        path = self.random.choice(SAMPLED)
        bad: dict[str, list[Any]] = {
            "temperature": [-1, 101],
            "top_p": [0, -0.1, 1.1],
            "top_k": [-2],
            "min_p": [2],
            "presence_penalty": [3],
            "repetition_penalty": [0],
            "min_tokens": [-1, 99],
            "stop_token_ids": [[-1]],
            "logit_bias": [{"x": 1}, {"-1": 1}, {"99999": 1}],
        }
        name = self.random.choice(list(bad))
        return self.with_field(path, name, self.random.choice(bad[name]))

    def bad_piece(self) -> Bad:
        """Something wrong inside of a message or an item."""
        path = self.random.choice([p for p in GOOD if {"messages", "input"} & GOOD[p].keys()])
        name = "input" if "input" in GOOD[path] else "messages"
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        wrong = self.random.choice(
            [
                {"role": "user"},
                {"role": "user", "content": 5},
                {"role": "user", "content": [image]},
                {"role": "user", "content": ["x"]},
                {"role": "user", "content": "x", "contents": "y"},
                {"role": 5, "content": "x"},
                {"content": "x"},
                {},
                [],
                "x",
                None,
            ]
        )
        return self.with_field(path, name, [MESSAGES[0], wrong])

    def bad_tool(self) -> Bad:
        path = self.random.choice([path for path in SAMPLED if path != "/v1/completions"])
        function = self.random.choice(
            [
                {"name": "a b"},
                {"name": ""},
                {"name": "x" * 65},
                {"name": 5},
                {"name": "f", "parameters": []},
                {"name": "f", "parameters": {"type": "array"}},
                {"name": "f", "parameters": {"maximum": 2.0, "x": {"y": [{"z": 0}] * 3}}, "q": 1},
                {},
            ]
        )
        tool = {"type": "function", "function": function}
        if path == "/v1/responses":
            tool = {"type": "function", **function}
        elif path == "/v1/messages":
            renamed = {"parameters": "input_schema"}
            tool = {renamed.get(name, name): value for name, value in function.items()}
        return self.with_field(path, "tools", [tool])

    def with_field(self, path: str, name: str, value: Any) -> Bad:
        return Bad(path, dump({**GOOD[path], name: value}), (name,))


def message_of(response: httpx.Response, path: str) -> str:
    """The message of an error, in the form of its API."""
    body = response.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and body["error"]["type"], body
    else:
        assert {"message", "type", "param", "code"} == set(body["error"]), body
    message: str = body["error"]["message"]
    return message


def check(app: LiveApp, bad: Bad) -> None:
    headers = {"Content-Type": bad.content_type}
    response = app.http.request(bad.method, bad.path, content=bad.body, headers=headers)
    about = (bad.method, bad.path, bad.body[:200], response.status_code, response.text[:300])
    assert response.status_code in bad.statuses, about
    message = message_of(response, bad.path)
    assert any(name in message for name in bad.names), about
    assert len(message) < 1000, about


def test_a_thousand_bad_requests(app: LiveApp) -> None:
    for bad in Maker(SEED).requests(COUNT):
        check(app, bad)
    for path, body in GOOD.items():
        assert app.http.post(path, json=body).status_code == 200


@pytest.mark.parametrize("path", list(GOOD))
def test_bodies_of_fifty_megabytes(app: LiveApp, path: str) -> None:
    size = 50 * MEBIBYTE
    check(app, Bad(path, b"x" * size))
    name = next(n for n in ("prompt", "messages", "input", "tokens") if n in GOOD[path])
    long = {
        "prompt": b'"%s"',
        "input": b'"%s"',
        "messages": b'[{"role": "user", "content": "%s"}]',
        "tokens": b'["%s"]',
    }[name] % (b"x" * size)
    raw = dump({**GOOD[path], name: 123454321}).replace(b"123454321", long)
    check(app, Bad(path, raw, (name,)))
    assert app.http.post(path, json=GOOD[path]).status_code == 200


def test_bodies_over_the_limit(app: LiveApp) -> None:
    too_large = b"x" * (65 * MEBIBYTE)
    response = app.http.post("/v1/completions", content=too_large)
    assert response.status_code == 413
    assert "over 67108864 bytes" in response.json()["error"]["message"]

    def parts() -> Iterator[bytes]:
        for _ in range(65):
            yield b" " * MEBIBYTE

    response = app.http.post("/v1/completions", content=parts())  # its length comes last
    assert response.status_code == 413
    assert app.http.post("/v1/completions", json=GOOD["/v1/completions"]).status_code == 200
