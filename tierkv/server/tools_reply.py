"""Calls of tools as chat completions show them, at once or as they grow."""

from __future__ import annotations

import uuid

from tierkv.server.replies import Json
from tierkv.server.tools_parsers import CallParser, CallPiece, Piece


class ToolTurn:
    """One answer: its text, and the calls that were found in it.

    Args:
        parser: a new one.
        is_parallel: whether calls after the first one count.
    """

    def __init__(self, parser: CallParser, *, is_parallel: bool) -> None:
        self._parser, self._is_parallel = parser, is_parallel
        self.num_calls = 0

    def read(self, text: str, *, is_over: bool) -> Json:
        """The delta for more of the answer: `content`, `tool_calls`, both or none."""
        pieces = self._parser.push(text) if text else []
        if is_over:
            pieces += self._parser.finish()
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = self._calls(pieces)
        delta: Json = {"content": content} if content else {}
        return {**delta, "tool_calls": calls} if calls else delta

    def _calls(self, pieces: list[Piece]) -> list[Json]:
        """One entry for each call with news."""
        calls: dict[int, Json] = {}
        for piece in pieces:
            if isinstance(piece, CallPiece) and (self._is_parallel or piece.index == 0):
                call = calls.setdefault(piece.index, {"index": piece.index, "function": {}})
                self._add(call, piece)
        return list(calls.values())

    def _add(self, call: Json, piece: CallPiece) -> None:
        function = call["function"]
        if piece.name is not None:
            self.num_calls += 1
            call |= {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
            function["name"] = piece.name
        function["arguments"] = function.get("arguments", "") + piece.arguments


def whole_message(delta: Json) -> Json:
    """The fields of a message for the delta that holds all of it."""
    calls = [
        {name: value for name, value in call.items() if name != "index"}
        for call in delta.get("tool_calls", ())
    ]
    content = delta.get("content", None if calls else "")
    return {"content": content, "tool_calls": calls} if calls else {"content": content}
