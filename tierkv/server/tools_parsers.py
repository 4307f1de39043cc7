"""From an answer's text, as it grows, to text and calls of tools.

A parser is fed pieces of text and gives back what became certain: text for the reader (`str`) and
pieces of calls (`CallPiece`). How the text is cut into pieces changes nothing but theirs.

    hermes     text <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    pythonic   [f(a=1), g(b="x")]

What looks like a call and turns out to be none is text. Two more parsers read what a grammar
guarantees: `ListParser` a JSON list of calls, `NamedParser` the arguments of one function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from tierkv.server.tools_json import CallObject
from tierkv.server.tools_pythonic import CallList, NotCalls, first_call


@dataclass(slots=True, frozen=True)
class CallPiece:
    """A call begins (`name` is set), or its arguments grow."""

    index: int
    name: str | None = None
    arguments: str = ""


Piece = str | CallPiece


class CallParser(Protocol):
    """Reads one answer."""

    def push(self, text: str) -> list[Piece]:
        """What became certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """What was held back, when no more text comes."""
        ...


class _ObjectReader:
    """A call's object, and whether it was told of: then it is no text any more."""

    def __init__(self, index: int, names: Collection[str] | None = None) -> None:
        self.index = index
        self.object = CallObject()
        self.is_told = False
        self._names = names

    def push(self, text: str, pieces: list[Piece]) -> str:
        """Take in text of the object; returns what follows it."""
        call = self.object
        fresh, used = call.push(text)
        if call.name is not None and self._names is not None and call.name not in self._names:
            call.is_broken = True
        elif (fresh or call.is_over) and call.name is not None:
            pieces.append(CallPiece(self.index, None if self.is_told else call.name, fresh))
            self.is_told = True
        return text[used:]


class HermesParser:
    """Calls between `<tool_call>` and `</tool_call>`; white space around them is no text.

    Args:
        names: of the tools; a call of another one is text.
    """

    _BEGIN, _END = "<tool_call>", "</tool_call>"

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""  # text that may be white space before a tag, or the tag's beginning
        self._raw = ""  # all of the call that is being read
        self._reader: _ObjectReader | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            reader = self._reader
            if reader is None:
                text = self._outside(text, pieces)
            elif reader.object.is_over or reader.object.is_broken:
                text = self._behind(reader, text)
            else:
                text = self._inside(reader, text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        text = self._held if self._reader is None else ""
        if self._num_calls and not text.strip():
            text = ""  # white space behind a call
        if self._reader is not None and not self._reader.is_told:
            text = self._BEGIN + self._raw
        return [text] if text else []

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        text, tag, rest = (self._held + text).partition(self._BEGIN)
        if tag:
            text, self._held = text.rstrip(), ""
            self._reader, self._raw = _ObjectReader(self._num_calls, self._names), ""
        else:
            certain = text[: len(text) - overlap(text, self._BEGIN)].rstrip()
            text, self._held = certain, text[len(certain) :]
        if text:
            pieces.append(text)
        return rest

    def _inside(self, reader: _ObjectReader, text: str, pieces: list[Piece]) -> str:
        rest = reader.push(text, pieces)
        if reader.is_told:
            self._raw, self._num_calls = "", reader.index + 1
            return rest
        self._raw += text[: len(text) - len(rest)]
        if reader.object.is_broken:
            pieces.append(self._BEGIN + self._raw)
            self._reader = None
        return rest

    def _behind(self, reader: _ObjectReader, text: str) -> str:
        """Look for the closing tag; without one, what follows is text."""
        text = self._held + text
        if reader.object.is_broken:  # half a call was told, so the rest of it is no text
            end = text.find(self._END)
            text = text[end if end >= 0 else len(text) - overlap(text, self._END) :]
        ahead = text.lstrip()
        if self._END.startswith(ahead):  # or is white space so far
            self._held = text
            if ahead != self._END:
                return ""
        self._held, self._reader = "", None
        return ahead.removeprefix(self._END)


class PythonicParser:
    """An answer that is a Python list of calls; any other answer is text.

    Args:
        names: of the tools; a list that begins with a call of another one is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._raw = ""  # all of the answer, until the first call is complete
        self._list: CallList | None = None
        self._is_text = self._has_text = False
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        if self._is_text:
            return self._give_up(text)
        if not self._num_calls:
            self._raw += text
        if self._list is None:
            start = first_call(self._raw, self._names)
            if start is None:
                return self._give_up(self._raw)
            if start == 0:
                return []  # it may yet become a list of calls
            self._list, text = CallList(), self._raw[start:]
        return self._read(self._list, text)

    def finish(self) -> list[Piece]:
        return [self._raw] if self._raw and not self._is_text and not self._num_calls else []

    def _read(self, calls: CallList, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        try:
            for name, arguments in calls.push(text):
                pieces.append(CallPiece(self._num_calls, name, arguments))
                self._num_calls += 1
        except NotCalls:
            return pieces + self._give_up(calls.rest if self._num_calls else self._raw)
        if calls.is_over:
            pieces += self._give_up(calls.rest)
        return pieces

    def _give_up(self, text: str) -> list[Piece]:
        """What comes from now on is text, and so is this; not so white space behind calls."""
        self._is_text = True
        if self._list is not None and self._list.is_over:
            text = text if self._has_text else text.lstrip()
            self._has_text = self._has_text or bool(text)
        return [text] if text else []


class ListParser:
    """`[{"name": ..., "arguments": ...}, ...]`, as a grammar makes it."""

    def __init__(self) -> None:
        self._reader: _ObjectReader | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._reader is None:
                text = text.lstrip("[], \n\t")
                if not text:
                    break
                self._reader = _ObjectReader(self._num_calls)
                self._num_calls += 1
            text = self._reader.push(text, pieces)
            if self._reader.object.is_broken:
                break
            if self._reader.object.is_over:
                self._reader = None
        return pieces

    def finish(self) -> list[Piece]:
        return []


class NamedParser:
    """The arguments of the one function that had to be called, as a grammar makes them."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> list[Piece]:
        name, self._name = self._name, None
        return [CallPiece(0, name, text)]

    def finish(self) -> list[Piece]:
        return []


PARSERS: dict[str, Callable[[Collection[str]], CallParser]] = {
    "hermes": HermesParser,
    "pythonic": PythonicParser,
}
"""Names of `--tool-call-parser`."""


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that the tag begins with."""
    sizes = range(min(len(text), len(tag) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)
