"""The reply to `/v1/messages`: a chat completion, told as blocks and events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from tierkv.server import sse
from tierkv.server.errors import AbortedError, anthropic_body, describe_error
from tierkv.server.generation import ChatReply
from tierkv.server.mapped_reply import ABORTED, MappedReply
from tierkv.server.messages_body import MessagesBody
from tierkv.server.replies import Json
from tierkv.server.turns import Step, TurnPart


class MessageReply(MappedReply):
    """One message of the assistant."""

    def __init__(self, chat: ChatReply, body: MessagesBody, model: str) -> None:
        super().__init__(chat)
        self._body, self._model = body, model
        self._message_id = f"msg_{uuid.uuid4().hex}"

    def whole(self) -> Json:
        """The message when its turn is over.

        Raises:
            AbortedError: the server ended it.
        """
        self._require_an_end()
        return self._message([block(part) for part in self.turn.parts], **self._ending())

    def opening(self) -> Iterator[Json]:
        """Events before the first block."""
        message = self._message([], stop_reason=None, stop_sequence=None)
        yield {"type": "message_start", "message": message}
        yield {"type": "ping"}

    def tell(self, step: Step) -> Iterator[Json]:
        """Events for one step of the turn."""
        place = {"index": step.part.index}
        if step.kind == "begin":
            yield {"type": "content_block_start", **place, "content_block": empty_block(step.part)}
        elif step.kind == "grow":
            yield {"type": "content_block_delta", **place, "delta": delta(step)}
        else:
            yield {"type": "content_block_stop", **place}

    def closing(self) -> Iterator[Json]:
        """Events after the last block.

        Raises:
            AbortedError: the server ended it.
        """
        self._require_an_end()
        yield {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def error_event(self, error: Exception) -> bytes:
        """The last event of a stream that `error` ends."""
        return sse.event(anthropic_body(*describe_error(error)), "error")

    def _require_an_end(self) -> None:
        if self.turn.finish_reason == "abort":
            raise AbortedError(ABORTED)

    def _message(self, content: list[Json], **ending: str | None) -> Json:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **ending,
            "usage": self._usage(),
        }

    def _ending(self) -> dict[str, str | None]:
        """Why the turn is over, in Anthropic's words."""
        turn = self.turn
        reason, sequence = "end_turn", None
        if turn.finish_reason == "length":
            is_limit = turn.usage["completion_tokens"] >= self._body.max_tokens
            reason = "max_tokens" if is_limit else "model_context_window_exceeded"
        elif turn.has_calls:
            reason = "tool_use"
        elif isinstance(turn.stop_reason, str):
            reason, sequence = "stop_sequence", turn.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> Json:
        """Anthropic counts the prompt in three parts; what is computed here is always cached."""
        usage = self.turn.usage
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }


def empty_block(part: TurnPart) -> Json:
    """A block before its first delta."""
    if part.is_text:
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}


def block(part: TurnPart) -> Json:
    """A block that is over."""
    whole = {"text": part.text} if part.is_text else {"input": arguments(part.text)}
    return {**empty_block(part), **whole}


def delta(step: Step) -> Json:
    """What a block grew by."""
    if step.part.is_text:
        return {"type": "text_delta", "text": step.delta}
    return {"type": "input_json_delta", "partial_json": step.delta}


def arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; of a call that was cut off, those that are there."""
    try:
        found = from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
