"""An assistant's turn as parts, text and calls of tools, made of a chat completion or its chunks.

This is what the APIs with an output of several parts are written from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tierkv.server.replies import Json


@dataclass(slots=True)
class TurnPart:
    """Text, or one call of a tool.

    Attributes:
        index: its place in the turn.
        call_id: the call's id; None for text.
        name: the tool's name; empty for text.
        text: the text, or the call's arguments as JSON.
        logprobs: entries of chat completions, if asked for; text only.
    """

    index: int
    call_id: str | None = None
    name: str = ""
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        return self.call_id is None


class Step(NamedTuple):
    """A part begins, grows or ends; `delta` is what it grew by."""

    kind: Literal["begin", "grow", "end"]
    part: TurnPart
    delta: str = ""
    logprobs: tuple[Json, ...] = ()


class Turn:
    """One turn, as it grows.

    Attributes:
        parts: what it holds so far.
        finish_reason: the chat completion's, None while it runs.
        stop_reason: the stop string or token id that ended it.
        usage: the latest token counts.
    """

    def __init__(self) -> None:
        self.parts: list[TurnPart] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.usage: Json = {}
        self._open: TurnPart | None = None
        self._call_number: int | None = None

    @classmethod
    def of(cls, reply: Json) -> Turn:
        """The turn of a whole chat completion."""
        turn = cls()
        (choice,) = reply["choices"]
        message = choice["message"]
        calls = [
            {**call, "index": number} for number, call in enumerate(message.get("tool_calls") or ())
        ]
        delta = {"content": message["content"], "tool_calls": calls}
        for _ in turn.steps({"choices": [{**choice, "delta": delta}], "usage": reply["usage"]}):
            pass
        return turn

    @property
    def has_calls(self) -> bool:
        return any(not part.is_text for part in self.parts)

    def steps(self, chunk: Json) -> Iterator[Step]:
        """Take in one chunk of a chat completion; what happens with it."""
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        for choice in chunk["choices"]:
            delta = choice["delta"]
            calls, logprobs = delta.get("tool_calls") or (), logprobs_of(choice)
            text = delta.get("content") or ""
            if text or (logprobs and not calls):  # tokens may come before their text is whole
                yield from self._grow_text(text, logprobs)
            for call in calls:
                yield from self._grow_call(call)
            if choice["finish_reason"] is not None:
                self.finish_reason = choice["finish_reason"]
                self.stop_reason = choice.get("stop_reason")
                yield from self._finish()

    def _grow_text(self, text: str, logprobs: tuple[Json, ...]) -> Iterator[Step]:
        part = self._open
        if part is None or not part.is_text:
            yield from self._end()
            part = self._begin(TurnPart(len(self.parts)))
            yield Step("begin", part)
        part.text += text
        part.logprobs += logprobs
        yield Step("grow", part, text, logprobs)

    def _grow_call(self, call: Json) -> Iterator[Step]:
        function: dict[str, Any] = call.get("function") or {}
        part = self._open
        if part is None or part.is_text or call["index"] != self._call_number:
            yield from self._end()
            part = self._begin(TurnPart(len(self.parts), call["id"], function["name"]))
            self._call_number = call["index"]
            yield Step("begin", part)
        text = function.get("arguments") or ""
        if text:
            part.text += text
            yield Step("grow", part, text)

    def _finish(self) -> Iterator[Step]:
        """End what is open; a turn of nothing is one of empty text."""
        if not self.parts:
            yield Step("begin", self._begin(TurnPart(0)))
        yield from self._end()

    def _begin(self, part: TurnPart) -> TurnPart:
        self.parts.append(part)
        self._open = part
        return part

    def _end(self) -> Iterator[Step]:
        if self._open is not None:
            yield Step("end", self._open)
            self._open = None


def logprobs_of(choice: Json) -> tuple[Json, ...]:
    """The log-probabilities of a chat choice's tokens."""
    return tuple((choice.get("logprobs") or {}).get("content") or ())
