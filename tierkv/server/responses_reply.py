"""The reply to `/v1/responses`: a chat completion, told as items and events."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator

from tierkv.server import sse
from tierkv.server.errors import describe_error
from tierkv.server.generation import ChatReply
from tierkv.server.mapped_reply import ABORTED, MappedReply
from tierkv.server.replies import Json
from tierkv.server.responses_body import ResponsesBody
from tierkv.server.turns import Step, TurnPart


class ResponseReply(MappedReply):
    """One response; items are named after it, so that whole replies and events agree."""

    def __init__(self, chat: ChatReply, body: ResponsesBody, model: str) -> None:
        super().__init__(chat)
        self._body, self._model = body, model
        self._key = uuid.uuid4().hex
        self._created_at = int(time.time())
        self._numbers = itertools.count()

    def whole(self) -> Json:
        """The response when its turn is over."""
        return self._response(self._final_status(), self._output())

    # -- events --------------------------------------------------------------------------------

    def opening(self) -> Iterator[Json]:
        """Events before the first item."""
        for kind in ("created", "in_progress"):
            yield self._of_response(kind, self._response("in_progress", []))

    def tell(self, step: Step) -> Iterator[Json]:
        """Events for one step of the turn."""
        tell = self._tell_text if step.part.is_text else self._tell_call
        yield from tell(step)

    def closing(self) -> Iterator[Json]:
        """The last event, with the whole response."""
        yield self._of_response(self._final_status(), self.whole())

    def error_event(self, error: Exception) -> bytes:
        """The last event of a stream that `error` ends."""
        found = describe_error(error)[1]["error"]
        fields = {name: found[name] for name in ("code", "message", "param")}
        return sse.event(self._numbered("error", **fields), "error")

    def _tell_text(self, step: Step) -> Iterator[Json]:
        part = step.part
        here = {**self._place(part), "content_index": 0}
        if step.kind == "begin":
            yield self._of_item("added", part, "in_progress", [])
            yield self._numbered("response.content_part.added", **here, part=output_text())
        elif step.kind == "grow":
            news = {"delta": step.delta, "logprobs": list(step.logprobs)}
            yield self._numbered("response.output_text.delta", **here, **news)
        else:
            whole = {"text": part.text, "logprobs": part.logprobs}
            yield self._numbered("response.output_text.done", **here, **whole)
            yield self._numbered("response.content_part.done", **here, part=output_text(part))
            yield self._of_item("done", part, self._item_status(part), [output_text(part)])

    def _tell_call(self, step: Step) -> Iterator[Json]:
        part, kind = step.part, "response.function_call_arguments"
        if step.kind == "begin":
            yield self._of_item("added", part, "in_progress")
        elif step.kind == "grow":
            yield self._numbered(f"{kind}.delta", **self._place(part), delta=step.delta)
        else:
            whole = {"name": part.name, "arguments": part.text}
            yield self._numbered(f"{kind}.done", **self._place(part), **whole)
            yield self._of_item("done", part, self._item_status(part))

    def _numbered(self, kind: str, **fields: object) -> Json:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _of_response(self, kind: str, response: Json) -> Json:
        return self._numbered(f"response.{kind}", response=response)

    def _of_item(
        self, kind: str, part: TurnPart, status: str, content: list[Json] | None = None
    ) -> Json:
        item = self._item(part, status, content)
        return self._numbered(f"response.output_item.{kind}", output_index=part.index, item=item)

    # -- bodies --------------------------------------------------------------------------------

    def _place(self, part: TurnPart) -> Json:
        return {"item_id": self._item_id(part), "output_index": part.index}

    def _item_id(self, part: TurnPart) -> str:
        return f"{'msg' if part.is_text else 'fc'}_{self._key}{part.index}"

    def _output(self) -> list[Json]:
        return [
            self._item(part, self._item_status(part), [output_text(part)])
            for part in self.turn.parts
        ]

    def _item(self, part: TurnPart, status: str, content: list[Json] | None = None) -> Json:
        """A part as an item; what has no end yet shows nothing of itself."""
        item_id = self._item_id(part)
        if part.is_text:
            head = {"id": item_id, "type": "message", "role": "assistant"}
            return {**head, "status": status, "content": content}
        return {
            "id": item_id,
            "type": "function_call",
            "call_id": part.call_id,
            "name": part.name,
            "arguments": "" if status == "in_progress" else part.text,
            "status": status,
        }

    def _item_status(self, part: TurnPart) -> str:
        """Only the last item can have been cut off."""
        is_last = part is self.turn.parts[-1]
        is_cut = is_last and self.turn.finish_reason in ("length", "abort")
        return "incomplete" if is_cut else "completed"

    def _final_status(self) -> str:
        return {"length": "incomplete", "abort": "failed"}.get(
            self.turn.finish_reason or "", "completed"
        )

    def _response(self, status: str, output: list[Json]) -> Json:
        is_cut, is_failed = status == "incomplete", status == "failed"
        return {
            "id": f"resp_{self._key}",
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": {"code": "server_error", "message": ABORTED} if is_failed else None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._model,
            "output": output,
            "usage": None if status == "in_progress" else self._usage(),
            **self._request_fields(),
        }

    def _request_fields(self) -> Json:
        """What the response repeats of the request; nothing is stored, whatever was asked for."""
        body = self._body
        tools = [tool.model_dump() for tool in body.tools or ()]
        choice = body.tool_choice if body.tool_choice is not None else "auto"
        return {
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": body.text_format(),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": tools,
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def _usage(self) -> Json:
        usage = self.turn.usage
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def output_text(part: TurnPart | None = None) -> Json:
    """The content of a message: empty before there is any."""
    text, logprobs = ("", []) if part is None else (part.text, part.logprobs)
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
