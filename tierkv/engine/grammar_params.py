"""What an output has to be, as a request says it: checked here, compiled in `engine/grammar.py`."""

from __future__ import annotations

import json as json_text
from dataclasses import dataclass, fields
from typing import Any

from tierkv.errors import RequestError

MAX_CHARACTERS = 2**17  # compiling takes time that grows with the square of it
FIELD = "structured_outputs"
WHITESPACE = r" |\n[ \t]{0,20}"
"""What may stand between the tokens of JSON; bounded, or a model could go on with it for ever."""


@dataclass(slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the output must be, guaranteed; exactly one field is given (vLLM's shape).

    Attributes:
        json: a JSON schema that the output is valid against, or its text.
        regex: a regular expression that the whole output matches.
        choice: texts, one of which is the output.
        grammar: a context-free grammar as Lark writes it (`start: ...`) or as llama.cpp does
            (GBNF, `root ::= ...`).
        json_object: True for any JSON object.

    Raises:
        RequestError: none or several are given, or the one has the wrong type.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise RequestError(f"{FIELD}.json_object", self.json_object, "must be True or False")
        self.json_object = self.json_object or None
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            fix = "give exactly one of json, regex, choice, grammar, json_object"
            raise RequestError(FIELD, given or None, fix)
        _check(given[0], getattr(self, given[0]))

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> StructuredOutputsParams:
        """Build from a plain dict (a wire message, a request's body).

        Raises:
            RequestError: an unknown name, unless it asks for nothing (None, False), or what the
                constructor refuses.
        """
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name not in known and value is not None and value is not False:
                fix = f"is not served: give one of {', '.join(sorted(known))}"
                raise RequestError(f"{FIELD}.{name}", value, fix)
        return cls(**{name: value for name, value in values.items() if name in known})

    def spec(self) -> tuple[str, str]:
        """The name of the field that is given, and its value as text."""
        if self.json_object:
            return "json_object", ""
        name = next(f.name for f in fields(self) if getattr(self, f.name) is not None)
        value = getattr(self, name)
        return name, value if isinstance(value, str) else _dump(name, value)

    def as_message(self) -> dict[str, Any]:
        """The one field, in a form that `from_mapping` takes and a wire can carry."""
        name, text = self.spec()
        if name == "json_object":
            return {name: True}
        return {name: self.choice if name == "choice" else text}


def _check(name: str, value: Any) -> None:
    field = f"{FIELD}.{name}"
    if name == "json":
        _check_json(field, value)
    elif name == "choice":
        is_list = isinstance(value, list) and value
        if not is_list or not all(isinstance(text, str) for text in value):
            raise RequestError(field, value, "must be a non-empty list of texts")
    elif name != "json_object" and (not isinstance(value, str) or not value):
        raise RequestError(field, value, "must be a text that is not empty")
    size = len(value if isinstance(value, str) else _dump(name, value))
    if size > MAX_CHARACTERS:
        fix = f"must be at most {MAX_CHARACTERS} characters long"
        raise RequestError(field, f"<{size} characters>", fix)


def _check_json(field: str, value: Any) -> None:
    schema = value
    if isinstance(value, str):
        try:
            schema = json_text.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(field, value, f"is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise RequestError(field, value, "must be a JSON schema: an object")


def _dump(name: str, value: Any) -> str:
    try:
        return json_text.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{FIELD}.{name}", value, f"is no JSON: {error}") from None
