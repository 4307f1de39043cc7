"""The form of an output as a body asks for it: `response_format`, `guided_*` and their like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, WithJsonSchema

from tierkv.engine.grammar_params import StructuredOutputsParams
from tierkv.errors import RequestError
from tierkv.server.fields import Model

if TYPE_CHECKING:
    from tierkv.server.protocol import GenerationBody

FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


StructuredOutputs = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "json": {"type": ["object", "string", "null"]},
                "regex": {"type": ["string", "null"], "minLength": 1},
                "choice": {"type": ["array", "null"], "minItems": 1, "items": {"type": "string"}},
                "grammar": {"type": ["string", "null"], "minLength": 1},
                "json_object": {"type": ["boolean", "null"]},
            },
            "additionalProperties": {"enum": [None, False]},
        }
    ),
]
"""vLLM's form, for `StructuredOutputsParams`."""


class JsonSchemaFormat(Model):
    """A JSON schema with a name; `strict` is always so here."""

    name: str
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Model):
    """OpenAI's form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Form(NamedTuple):
    """What the output must be, and the field that says so."""

    field: str
    params: StructuredOutputsParams

    def public_name(self, field: str) -> str:
        """The body's field for an error of the engine about `structured_outputs`."""
        return field if self.field == "structured_outputs" else self.field


def form_of(body: GenerationBody) -> Form | None:
    """The form that a body asks for, None for any text.

    Raises:
        RequestError: several fields ask for one, or one is wrong; naming the field.
    """
    given = [name for name in FIELDS if getattr(body, name) is not None]
    if body.response_format is not None:
        check_schema_is_meant(body.response_format)
        if body.response_format.type == "text":
            given.remove("response_format")
    if not given:
        return None
    if len(given) > 1:
        raise RequestError(given[1], "given", f"cannot be combined with {given[0]}")
    (name,) = given
    if body.response_format is not None and name == "response_format":
        return _of_response_format(body.response_format)
    if name == "structured_outputs":
        return Form(name, StructuredOutputsParams.from_mapping(body.structured_outputs or {}))
    try:
        kind = name.removeprefix("guided_")
        return Form(name, StructuredOutputsParams.from_mapping({kind: getattr(body, name)}))
    except RequestError as error:
        raise RequestError(name, error.value, error.fix) from None


def check_schema_is_meant(given: ResponseFormat) -> None:
    """Refuse a schema beside a type that does not look at it.

    Raises:
        RequestError: there is one.
    """
    if given.json_schema is not None and given.type != "json_schema":
        fix = "must be json_schema, since there is a schema"
        raise RequestError("response_format.type", given.type, fix)


def _of_response_format(given: ResponseFormat) -> Form:
    if given.type == "json_object":
        return Form("response_format", StructuredOutputsParams(json_object=True))
    where = "response_format.json_schema"
    if given.json_schema is None:
        raise RequestError(where, None, "is required: the type json_schema needs it")
    where = f"{where}.schema"
    try:
        return Form(where, StructuredOutputsParams(json=given.json_schema.json_schema))
    except RequestError as error:
        raise RequestError(where, error.value, error.fix) from None
