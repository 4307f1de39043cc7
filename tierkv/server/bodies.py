"""Strict request bodies for the APIs that are mapped onto chat completions.

Unions are tagged in angle brackets, so that an error names the field as the client wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, Discriminator, ValidationError, model_validator

from tierkv.errors import RequestError
from tierkv.server.fields import (
    LIST,
    TEXT,
    Model,
    Stop,
    TextOrList,
    Whole,
    is_neutral,
    text_or_list,
)
from tierkv.server.parsing import parse_object, place, request_error, unknown_field
from tierkv.server.protocol import ChatBody, CommonFields

__all__ = [
    "LIST",
    "TEXT",
    "MappedBody",
    "Part",
    "Refusal",
    "SamplingBody",
    "Stop",
    "TextOrList",
    "Whole",
    "by_field",
    "by_type",
    "chat_body",
    "check_body",
    "parse_strictly",
    "text_or_list",
]

WRONG_KIND = "wrong kind by "
WORDS = {
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "list_type": "a list",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
}
"""pydantic's errors in the words of JSON, after "must be"."""

M = TypeVar("M", bound=BaseModel)


class Part(Model):
    """A piece of a body."""


class Refusal:
    """Why a field is refused, and the values at which it asks for nothing."""

    def __init__(self, fix: str = "is not served", *, neutral: Sequence[Any] = ()) -> None:
        self.fix, self.neutral = fix, neutral

    def lets_pass(self, value: Any) -> bool:
        """Whether the value asks for nothing."""
        return is_neutral(value, self.neutral)


class MappedBody(Part):
    """A whole body that becomes a `ChatBody`.

    Attributes:
        REFUSALS: fields of the API that are not served.
        RENAMES: patterns of the chat's field names, and what the field is called here.
    """

    REFUSALS: ClassVar[dict[str, Refusal]] = {}
    RENAMES: ClassVar[tuple[tuple[str, str], ...]] = ()

    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_by_name(cls, values: Any) -> Any:
        """Drop what asks for nothing; refuse the rest of what is not served."""
        if not isinstance(values, dict):
            return values
        kept = dict(values)
        for name, refusal in cls.REFUSALS.items():
            value = kept.pop(name, None)
            if value is not None and not refusal.lets_pass(value):
                raise RequestError(name, value, refusal.fix)
        return kept

    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat completion; None is not given."""
        raise NotImplementedError

    def public_name(self, field: str) -> str:
        """The body's field for a field of the chat or of the engine's request."""
        for pattern, name in self.RENAMES:
            if re.match(pattern, field):
                return re.sub(pattern, name, field, count=1)
        return field


class SamplingBody(MappedBody, CommonFields):
    """A body with the sampling fields of completions, under the same names."""

    def sampling_fields(self) -> dict[str, Any]:
        """Those of the chat completion."""
        return {name: getattr(self, name) for name in CommonFields.model_fields}


def by_field(field: str, tags: dict[str, str], *, default: str | None = None) -> Discriminator:
    """Choose among objects by a field; `default` is its value in those without."""

    def tag(value: Any) -> str | None:
        is_object = isinstance(value, dict)
        given = value.get(field) if is_object else getattr(value, field, None)
        kind = default if given is None and is_object else given
        return tags.get(kind) if isinstance(kind, str) else None

    return Discriminator(
        tag,
        custom_error_type=WRONG_KIND + field,
        custom_error_message=f"one of: {', '.join(tags)}",
    )


def by_type(tags: dict[str, str], *, default: str | None = None) -> Discriminator:
    """Choose among objects by their `type`."""
    return by_field("type", tags, default=default)


def parse_strictly(raw: bytes, body: type[M]) -> M:
    """The request body as an object of type `body`.

    Raises:
        RequestError: not JSON, not an object, or a field that is wrong; names it.
    """
    return check_body(parse_object(raw), body)


def check_body(values: dict[str, Any], body: type[M]) -> M:
    """The values as an object of type `body`.

    Raises:
        RequestError: naming the field that is wrong.
    """
    try:
        return body.model_validate(values)
    except ValidationError as error:
        raise complaint(error, body) from None


def complaint(error: ValidationError, body: type[BaseModel]) -> RequestError:
    """The first complaint of pydantic as an error that names the field."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    location = first["loc"]
    where = place(location) or (str(location[0]) if location else "body")
    if first["type"] == "missing":
        return RequestError(where, None, "is required")
    given = first["input"]
    if first["type"] == "extra_forbidden":
        return RequestError(where, given, unknown_field(location, body))
    if first["type"].startswith(WRONG_KIND):
        if not isinstance(given, dict):
            return RequestError(where, given, "must be an object")
        field = first["type"].removeprefix(WRONG_KIND)
        return RequestError(f"{where}.{field}", given.get(field), f"must be {first['msg']}")
    wants = WORDS.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return RequestError(where, given, f"must be {wants}")


def chat_body(values: dict[str, Any]) -> ChatBody:
    """The chat completion that a mapped body asks for.

    Raises:
        RequestError: naming the chat's field.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return ChatBody.model_validate(given)
    except ValidationError as error:
        raise request_error(error, ChatBody) from None
