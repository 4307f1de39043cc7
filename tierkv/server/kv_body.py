"""What `/kv/*` takes: a prefix by its prompt, messages or session, and what to do with it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator

from tierkv.errors import RequestError
from tierkv.server.bodies import LIST, TEXT, MappedBody, Part, Refusal, text_or_list
from tierkv.server.replies import Json

Prompt = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[int], Tag(LIST)],
    Discriminator(
        text_or_list,
        custom_error_type="text_or_token_ids",
        custom_error_message="text or a list of token ids",
    ),
]


class PrefixBody(MappedBody):
    """Body of `/kv/unpin`: names blocks by exactly one of prompt, messages and session_id."""

    REFUSALS: ClassVar[dict[str, Refusal]] = {
        "chat_template": Refusal("is the server's: start it with --chat-template"),
    }
    FORMS: ClassVar[tuple[str, ...]] = ("prompt", "messages", "session_id")

    model: str | None = None
    prompt: Prompt | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = False
    session_id: str | None = None
    cache_salt: str | None = None

    @model_validator(mode="after")
    def check_forms(self) -> PrefixBody:
        """Exactly one of them."""
        given = [name for name in self.FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            fix = f"give exactly one of {', '.join(self.FORMS)}"
            raise RequestError(given[1] if given else self.FORMS[0], "<prefix>", fix)
        return self

    def chat_fields(self) -> Json:
        """The fields of the chat completion whose prompt begins with the prefix."""
        return {
            "chat_template_kwargs": self.chat_template_kwargs,
            "messages": self.messages,
            "tools": self.tools,
            "add_generation_prompt": self.add_generation_prompt,
        }


class TimedPrefixBody(PrefixBody):
    """Body of `/kv/pin` and `/kv/ttl`; `ttl` are seconds, and null stands for ever."""

    ttl: float | None = None


class WarmBody(TimedPrefixBody):
    """Body of `/kv/warm`; with `pin` the blocks are pinned, too, for `ttl` seconds if given.

    `session_id` names the blocks, as in `kv_hints`.
    """

    FORMS: ClassVar[tuple[str, ...]] = ("prompt", "messages")

    priority: int | None = None
    pin: bool = False


class WaitBody(Part):
    """Body of `/kv/flush` and `/kv/sleep`: for how many seconds to wait, at most."""

    timeout: Annotated[float, Field(ge=0, le=3600)] = 60.0
