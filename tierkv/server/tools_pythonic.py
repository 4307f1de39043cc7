"""Reads `[f(a=1), g(b="x")]` while it is being written: calls as Python writes them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator

_BEGINNING = re.compile(r"\s*(?:\[\s*(?:([A-Za-z_][\w.]*)\s*(\()?)?)?")
_JSON_NAMES = {"true": True, "false": False, "null": None}
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_BETWEEN = ", \t\n"


class NotCalls(ValueError):
    """An element of the list is no call with constants as keyword arguments."""


def first_call(text: str, names: Collection[str]) -> int | None:
    """Where the first call begins in a text that begins with a list of calls of `names`.

    0 while that is not certain, None when it is no such list.
    """
    found = _BEGINNING.match(text)
    assert found is not None  # the pattern matches nothing too
    name, parenthesis = found.groups()
    if parenthesis:
        return found.start(1) if name in names else None
    if found.end() < len(text):
        return None
    return 0 if name is None or any(known.startswith(name) for known in names) else None


class CallList:
    """The elements of a list, fed from behind its opening bracket on.

    Attributes:
        is_over: the list is closed.
        rest: text that belongs to no complete call.
    """

    def __init__(self) -> None:
        self.is_over = False
        self.rest = ""
        self._at = 0  # how much of `rest` was looked at
        self._open: list[str] = []
        self._quote = ""

    def push(self, text: str) -> Iterator[tuple[str, str]]:
        """Names and arguments (as JSON) of the calls that became complete.

        Raises:
            NotCalls: a complete element is no call; it is in `rest`.
        """
        self.rest += text
        while not self.is_over:
            if self._at == 0:
                self.rest = self.rest.lstrip(_BETWEEN)
                if self.rest.startswith("]"):
                    self.is_over, self.rest = True, self.rest[1:]
                    return
            if not self._reach_end():
                return
            call = read_call(self.rest[: self._at])
            self.rest, self._at = self.rest[self._at :], 0
            yield call

    def _reach_end(self) -> bool:
        """Look on until the present call ends; False when it does not yet."""
        while self._at < len(self.rest):
            char = self.rest[self._at]
            if self._quote and char == "\\":
                if self._at + 1 == len(self.rest):
                    return False
                self._at += 1
            elif self._quote:
                self._quote = "" if char == self._quote else self._quote
            elif char in "'\"":
                self._quote = char
            elif char in _CLOSERS:
                self._open.append(_CLOSERS[char])
            elif char in ")]}" and (not self._open or self._open.pop() != char):
                raise NotCalls(self.rest)
            self._at += 1
            if char == ")" and not self._open and not self._quote:
                return True
        return False


def read_call(text: str) -> tuple[str, str]:
    """Name and arguments, as JSON, of one call.

    Raises:
        NotCalls: it is none.
    """
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            raise NotCalls(text)
        arguments = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise NotCalls(text)
            arguments[keyword.arg] = _constant(keyword.value)
        return ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotCalls(text) from error


def _constant(node: ast.expr) -> object:
    """A literal's value; JSON's names of constants are known too."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_constant(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return dict(_entries(node))
    value = ast.literal_eval(node)
    if value is None or isinstance(value, str | int | float):
        return value
    raise NotCalls(ast.unparse(node))


def _entries(node: ast.Dict) -> Iterator[tuple[str, object]]:
    for key, value in zip(node.keys, node.values, strict=True):
        name = None if key is None else _constant(key)
        if not isinstance(name, str):
            raise NotCalls(ast.unparse(node))
        yield name, _constant(value)
