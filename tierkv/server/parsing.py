"""From bytes to checked bodies; what is wrong is named as the client wrote it."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from tierkv.errors import RequestError
from tierkv.server.fields import NOT_SERVED

Body = TypeVar("Body", bound=BaseModel)

MAX_DEPTH = 100
"""Objects and lists within each other in a request."""

_MAYBE_LARGE = re.compile(rb"[0-9.][eE]\+?[0-9]{2}|[0-9]{309}")
"""What a number has that is larger than any float."""

Place = tuple[int | str, ...]


def parse_body(raw: bytes, body: type[Body]) -> Body:
    """The request body as an object of type `body`.

    Raises:
        RequestError: not JSON, not an object, or a field that is wrong; names it.
    """
    values = parse_object(raw)
    try:
        return body.model_validate(values)
    except ValidationError as error:
        raise request_error(error, body) from None


def parse_object(raw: bytes) -> dict[str, Any]:
    """The request body as a JSON object.

    Raises:
        RequestError: it is none.
    """
    try:
        values = json.loads(raw, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError("body", describe(raw), f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError("body", values, "must be a JSON object")
    refuse_deep_nesting(raw, values)
    refuse_infinity(raw, values)
    refuse_half_characters(raw, values)
    return values


def refuse_deep_nesting(raw: bytes, values: dict[str, Any]) -> None:
    """Whatever walks through values recursively may rely on a limit far below Python's own."""
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        inner = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise RequestError("body", describe(raw), f"is nested more than {MAX_DEPTH} deep")


def refuse_constant(name: str) -> NoReturn:
    """JSON has no NaN and no Infinity, though Python's parser takes them."""
    raise ValueError(f"{name} is not a JSON value")


def refuse_infinity(raw: bytes, values: dict[str, Any]) -> None:
    """Python reads 1e999 as infinity, which JSON cannot say again."""
    if _MAYBE_LARGE.search(raw) is None:
        return
    for where, number in floats(values, ()):
        if math.isinf(number):
            raise RequestError(place(where), number, "is larger than any number")


def floats(value: Any, where: Place) -> Iterator[tuple[Place, float]]:
    """The floats inside a value, each with its place."""
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from floats(item, (*where, name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from floats(item, (*where, number))


def refuse_half_characters(raw: bytes, values: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair, which is no text and which tokenizers refuse."""
    if b"\\ud" not in raw.lower():
        return
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("body", "\\ud...", "holds half of a surrogate pair") from None


def describe(raw: bytes) -> str:
    return raw[:60].decode(errors="replace")


def request_error(error: ValidationError, body: type[BaseModel]) -> RequestError:
    """The first complaint of pydantic as an error that names the field."""
    first, *others = error.errors(include_url=False)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "extra_forbidden":
        where = place(first["loc"]) or name
        return RequestError(where, first["input"], unknown_field(first["loc"], body))
    if first["type"] == "missing":
        return RequestError(place(first["loc"]), None, "is required")
    # A union complains once per member; the field is what the client knows.
    others = [e for e in others if e["type"] not in ("missing", "extra_forbidden")]
    same = [first, *(e for e in others if e["loc"][:1] == first["loc"][:1])]
    wants = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in same))
    where = place(first["loc"]) if len(same) == 1 else name
    return RequestError(where, first["input"], f"must be {wants}")


def place(location: Place) -> str:
    """`("messages", 0, "role")` -> `messages[0].role`."""
    text = ""
    for part in location:
        if text and isinstance(part, str) and part.startswith("<") and part.endswith(">"):
            continue  # the tag of a union's member
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part or '""'
    return text


def unknown_field(location: Place, body: type[BaseModel]) -> str:
    """What to say of a field that no body has."""
    name = str(location[-1])
    if name in NOT_SERVED or len(location) > 1:
        return "is not served"
    near = difflib.get_close_matches(name, list(body.model_fields), n=1)
    return "is no field of this request" + (f"; did you mean {near[0]}?" if near else "")
