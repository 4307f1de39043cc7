"""What `/tokenize` and `/detokenize` take, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from tierkv.server.bodies import MappedBody, Part, Refusal, Whole, check_body
from tierkv.server.parsing import parse_object
from tierkv.server.replies import Json
from tierkv.server.tools_body import Message, Tool


class TokenizeBody(Part):
    """Body of `/tokenize` with a prompt, as for completions."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatBody(MappedBody):
    """Body of `/tokenize` with messages, as for chat completions."""

    REFUSALS: ClassVar[dict[str, Refusal]] = {
        "chat_template": Refusal("is the server's: start it with --chat-template"),
        "add_special_tokens": Refusal(
            "is for a prompt: the chat template writes the special tokens of messages",
            neutral=(False,),
        ),
        "prompt": Refusal("give either prompt or messages"),
    }

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    def chat_fields(self) -> Json:
        """The fields of the chat completion whose prompt is asked for."""
        return {
            "chat_template_kwargs": self.chat_template_kwargs,
            "messages": self.messages,
            "tools": self.tools,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }


class DetokenizeBody(Part):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: list[Whole]


def parse_tokenize(raw: bytes) -> TokenizeBody | TokenizeChatBody:
    """The body in the form that it has: with messages, or with a prompt.

    Raises:
        RequestError: naming the field.
    """
    values = parse_object(raw)
    is_chat = values.get("messages") is not None
    return check_body(values, TokenizeChatBody) if is_chat else check_body(values, TokenizeBody)
