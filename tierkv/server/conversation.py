"""Conversations of APIs with other shapes, put together as chat completions write them."""

from __future__ import annotations

from tierkv.server.replies import Json


class Conversation:
    """Messages of a chat completion, built one piece after the other.

    Attributes:
        messages: what was said so far.
    """

    def __init__(self) -> None:
        self.messages: list[Json] = []

    def say(self, role: str, text: str, *, joins: bool = False) -> None:
        """Add a message; with `joins`, to the last one if its role is the same."""
        last = self.messages[-1] if self.messages else {}
        if joins and last.get("role") == role and "tool_calls" not in last:
            last["content"] += "\n" + text
        else:
            self.messages.append({"role": role, "content": text})

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """Add a call of a tool to the assistant's message that it belongs to."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        function = {"name": name, "arguments": arguments}
        calls = self.messages[-1].setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def result(self, call_id: str, text: str) -> None:
        """Add what a call gave."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
