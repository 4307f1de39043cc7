"""A reply of another API over a chat completion: what is common to all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from tierkv.errors import RequestError
from tierkv.server import sse
from tierkv.server.bodies import MappedBody, chat_body
from tierkv.server.context import ServerContext
from tierkv.server.generation import ChatReply, stream_chunks
from tierkv.server.replies import Json
from tierkv.server.turns import Step, Turn

ABORTED = (
    "the request was aborted: the server is shutting down, or its grammar could not go on (then the"
    " server's log says why)"
)


def chat_reply(context: ServerContext, body: MappedBody, model: str) -> ChatReply:
    """The chat completion that `body` asks for.

    Raises:
        RequestError: naming the chat's field.
    """
    chat = chat_body(body.chat_fields())
    return ChatReply(context.engine, chat, model, context.settings)


@contextmanager
def naming_fields_of(body: MappedBody) -> Iterator[None]:
    """Errors inside name the body's fields instead of the chat's."""
    try:
        yield
    except RequestError as error:
        raise type(error)(body.public_name(error.field), error.value, error.fix) from None


class MappedReply(ABC):
    """The chat completion's turn, at once or as it grows; events are named by their `type`."""

    def __init__(self, chat: ChatReply) -> None:
        self._chat = chat
        self.num_sequences = chat.num_sequences
        self.turn = Turn()

    async def body(self) -> Json:
        """The whole reply at once."""
        self.turn = Turn.of(await self._chat.body())
        return self.whole()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events."""
        is_open = False
        chunks = stream_chunks(self._chat, wants_usage=True, in_all=True)
        async with aclosing(chunks):
            async for chunk in chunks:
                told = self._told(chunk, is_first=not is_open)
                is_open = True
                for payload in told:
                    yield sse.event(payload, payload["type"])
        for payload in self.closing():
            yield sse.event(payload, payload["type"])

    def _told(self, chunk: Json, *, is_first: bool) -> Iterator[Json]:
        steps = self.turn.steps(chunk)
        begun = list(steps) if is_first else steps  # the opening shows the chunk's token counts
        if is_first:
            yield from self.opening()
        for step in begun:
            yield from self.tell(step)

    @abstractmethod
    def whole(self) -> Json:
        """The body for a turn that is over."""

    @abstractmethod
    def opening(self) -> Iterator[Json]:
        """Events before the first part."""

    @abstractmethod
    def tell(self, step: Step) -> Iterator[Json]:
        """Events for one step of the turn."""

    @abstractmethod
    def closing(self) -> Iterator[Json]:
        """Events after the last part."""

    @abstractmethod
    def error_event(self, error: Exception) -> bytes:
        """The last event of a stream that `error` ends."""
