"""Reads `{"name": ..., "arguments": {...}}` while it is being written."""

from __future__ import annotations

import json
import re

_PLAIN = re.compile(r'[^"\\]+')
_OUTSIDE_STRINGS = re.compile(r"[\w\s+\-.:,{}\[\]]")
_ARGUMENTS = ("arguments", "parameters")
_OPENING, _CLOSING = "{[", "}]"


class JsonValue:
    """Finds the end of one JSON value; keeps its text.

    Attributes:
        first: its first character, empty before there is one.
        is_over: the end was found.
        is_broken: this is no JSON. Only what is needed to find the end is checked.
    """

    def __init__(self) -> None:
        self.first = ""
        self.is_over = self.is_broken = False
        self._parts: list[str] = []
        self._depth = self._num_taken = 0
        self._in_string = self._is_escaped = False

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._parts)

    def take_new(self) -> str:
        """What came since the last call."""
        news = "".join(self._parts[self._num_taken :])
        self._num_taken = len(self._parts)
        return news

    def take(self, text: str, at: int) -> int:
        """Take one character or more of `text` from `at` on; where the rest begins.

        It begins at `at` itself when the value had ended before: a number ends at what follows.
        """
        char = text[at]
        self.first = self.first or char
        if self._in_string:
            return self._take_in_string(text, at)
        if self._depth == 0 and self._parts and (char in ",}]" or char.isspace()):
            self.is_over = True
            return at
        if char == '"':
            self._in_string = True
        elif _OUTSIDE_STRINGS.match(char) is None or (char in _CLOSING and not self._depth):
            self.is_broken = True
        self._depth += (char in _OPENING) - (char in _CLOSING)
        self._parts.append(char)
        self.is_over = char in _CLOSING and self._depth == 0
        return at + 1

    def _take_in_string(self, text: str, at: int) -> int:
        plain = None if self._is_escaped else _PLAIN.match(text, at)
        if plain is not None:
            self._parts.append(plain.group())
            return plain.end()
        char = text[at]
        self._parts.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        else:
            self._in_string = False
            self.is_over = self._depth == 0
        return at + 1


class CallObject:
    """One call, as an object with a name and arguments, in any order and beside other keys.

    Attributes:
        name: the function's, once it is known.
        is_over: the object is complete.
        is_broken: it is no such object.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_over = self.is_broken = False
        self._expects = "{"
        self._key = ""
        self._value: JsonValue | None = None
        self._arguments = ""  # known, and not given out before the name is
        self._has_arguments = False

    def push(self, text: str) -> tuple[str, int]:
        """Take in more of the object.

        Returns:
            What the arguments grew by, nothing before the name is known; and how much of `text`
            belongs to the object.
        """
        at = 0
        while at < len(text) and not self.is_over and not self.is_broken:
            at = self._step(text, at)
        if self._value is not None and self._expects == "value":
            self._stream(self._value)
        if self.name is None:
            return "", at
        fresh, self._arguments = self._arguments, ""
        return fresh, at

    def _step(self, text: str, at: int) -> int:
        char = text[at]
        if self._value is None:
            if char.isspace():
                return at + 1
            if self._expects in ("key", "value"):
                self._value = JsonValue()
            else:
                self._punctuate(char)
                return at + 1
        if self._expects == "key" and char == "}" and not self._value.first:
            self._value = None
            self._close()
            return at + 1
        at = self._value.take(text, at)
        self.is_broken = self.is_broken or self._value.is_broken
        if self._value.is_over:
            self._end_value(self._value)
        return at

    def _punctuate(self, char: str) -> None:
        """What stands between keys and values."""
        if char == "}" and self._expects == ",":
            self._close()
        elif char == self._expects:
            self._expects = {"{": "key", ",": "key", ":": "value"}[char]
        else:
            self.is_broken = True

    def _end_value(self, value: JsonValue) -> None:
        self._value = None
        try:
            if self._expects == "key":
                self._key, self._expects = str(json.loads(value.text)), ":"
                return
            self._expects = ","
            if self._key == "name":
                self.name = str(json.loads(value.text))
            elif self._key in _ARGUMENTS:
                self._end_arguments(value)
        except ValueError:
            self.is_broken = True

    def _stream(self, value: JsonValue) -> None:
        """Give out what there is of an object; other kinds of values are known at their end."""
        if self._key in _ARGUMENTS and value.first == "{":
            self._arguments += value.take_new()

    def _end_arguments(self, value: JsonValue) -> None:
        self._has_arguments = True
        if value.first == "{":
            self._arguments += value.take_new()
        elif value.first == '"':  # JSON inside of JSON
            self._arguments += json.loads(value.text)
        else:
            self._arguments += "{}" if value.text == "null" else value.text

    def _close(self) -> None:
        self.is_over = True
        self.is_broken = self.name is None
        if not self._has_arguments:
            self._arguments += "{}"
