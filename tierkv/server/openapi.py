"""The OpenAPI schema: what the routes declare, and what only the running server knows.

Bodies are parsed by hand, for errors that name fields, so FastAPI cannot derive their schemas:
routes declare them with `operation`, and `DocumentedApp` makes components of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode

from tierkv.errors import InvariantError
from tierkv.server import schemas
from tierkv.server.bodies import MappedBody
from tierkv.server.fields import NEUTRAL, Model
from tierkv.server.protocol import CompletionBody, GenerationBody
from tierkv.server.replies import Json

REF = "#/components/schemas/{model}"
COMPONENTS = "x-components"
"""Where an operation keeps the schemas that it refers to, until they become components."""

ADMIN = "x-admin"
"""Where it says whether it needs an administrator."""

STATUSES = {
    400: "A field is wrong: the message names it, its value and what to do.",
    401: "The API key is missing or wrong.",
    403: "The API key is not an administrator's.",
    404: "The model is not served here.",
    409: "It cannot be done now.",
    413: "The body is over 64 MiB.",
    415: "The body says that it is no JSON.",
    503: "Too much is in flight, or the engine is gone.",
    504: "The request took longer than the server allows.",
}
BODY_ERRORS = (400, 404, 413, 415)
GENERATION_ERRORS = (*BODY_ERRORS, 503, 504)

SECURITY: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}
COUNT = {"minimum": 1, "maximum": 2**63 - 1}
LOGPROBS = {"minimum": 0, "maximum": 1024}
BOUNDS: dict[str, Json] = {
    "n": {"minimum": 1, "maximum": 1024},
    "best_of": {"minimum": 1, "maximum": 1024},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 2**63 - 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 100},
    "seed": INT64,
    "priority": INT64,
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "max_output_tokens": COUNT,
    "min_tokens": {"minimum": 0, "maximum": 2**63 - 1},
    "logprobs": LOGPROBS,
    "top_logprobs": LOGPROBS,
    "prompt_logprobs": LOGPROBS,
    "length_penalty": {"minimum": -100, "maximum": 100},
}
"""What `SamplingParams` takes, by field."""


TEXT: Json = {"type": "string", "minLength": 1}
TOKEN_ID: Json = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
TOKEN_IDS: Json = {"type": "array", "minItems": 1, "items": TOKEN_ID}
PROMPT: Json = {
    "title": "Prompt",
    "anyOf": [
        TEXT,
        TOKEN_IDS,
        {"type": "array", "minItems": 1, "items": {"anyOf": [TEXT, TOKEN_IDS]}},
    ],
}
"""The forms of a completion's prompt."""

SHAPES: dict[str, dict[str, Json]] = {
    "stop": {"string": TEXT, "array": {"items": TEXT}},
    "stop_sequences": {"array": {"items": TEXT}},
    "stop_token_ids": {"array": {"items": TOKEN_ID}},
    "allowed_token_ids": {"array": TOKEN_IDS},
    "tokens": {"array": {"items": TOKEN_ID}},
    "logit_bias": {"object": {"propertyNames": {"pattern": "^[0-9]{1,18}$"}}},
    "truncate_prompt_tokens": {
        "integer": {"minimum": -1, "maximum": 2**63 - 1, "not": {"const": 0}}
    },
    "guided_regex": {"string": TEXT},
    "guided_grammar": {"string": TEXT},
    "guided_choice": {"array": {"minItems": 1}},
}
"""What is checked of a field's value by those who use it, by the value's type."""


def ref(model: type[BaseModel]) -> Json:
    """A reference to the model among the document's components."""
    return {"$ref": REF.format(model=model.__name__)}


def as_json(*models: type[BaseModel]) -> Json:
    """JSON of one of the models."""
    refs = [ref(model) for model in models]
    return {"application/json": {"schema": refs[0] if len(refs) == 1 else {"oneOf": refs}}}


def as_events(*models: type[BaseModel], last: str | None = None) -> Json:
    """A stream of server-sent events whose data is one of the models as JSON, or at last a word."""
    refs = [ref(model) for model in models]
    content = refs[0] if len(refs) == 1 else {"anyOf": refs}
    data: Json = {"type": "string", "contentMediaType": "application/json"}
    data["contentSchema"] = content
    data = {"anyOf": [data, {"const": last}]} if last else data
    properties = {"event": {"type": "string"}, "data": data}
    item = {"type": "object", "required": ["data"], "properties": properties}
    return {"text/event-stream": {"itemSchema": item}}


@cache
def model_schemas(model: type[BaseModel]) -> Json:
    """The model's schema and those that it refers to, by name."""
    is_body = issubclass(model, Model)
    mode: JsonSchemaMode = "validation" if is_body else "serialization"
    schema = model.model_json_schema(ref_template=REF, mode=mode)
    inner: Json = schema.pop("$defs", {})
    if is_body:
        describe_body(schema, model)
    return {**inner, model.__name__: schema}


def operation(
    tag: str,
    *,
    body: type[BaseModel] | tuple[type[BaseModel], ...] = (),
    reply: type[BaseModel] | None = None,
    event: type[BaseModel] | None = None,
    last_event: str | None = None,
    error: type[BaseModel] = schemas.Error,
    errors: tuple[int, ...] = (),
    is_keyed: bool = False,
    is_admin: bool = False,
) -> dict[str, Any]:
    """Arguments of `add_api_route` that describe an endpoint.

    Args:
        tag: the API that it belongs to.
        body: what it takes, in one of several forms; none for nothing.
        reply: what it answers, None for an empty response.
        event: what it streams, if it does; errors are among the events.
        last_event: what it streams at last, unless it is an event like the others. Errors are then
            of the form of `error`.
        error: the form of its errors.
        errors: their statuses, besides those about keys.
        is_keyed: it asks for the API key, if there is one.
        is_admin: it asks for an administrator's key.
    """
    is_keyed = is_keyed or is_admin
    errors = (*errors, *((401,) if is_keyed else ()), *((403,) if is_admin else ()))
    content = as_json(reply) if reply else {}
    if event:
        models = (event, error) if last_event else (event,)
        content |= as_events(*models, last=last_event)
    responses: dict[int, Json] = {
        200: {"description": "Done.", **({"content": content} if content else {})}
    }
    for status in errors:
        responses[status] = {"description": STATUSES[status], "content": as_json(error)}
    bodies = body if isinstance(body, tuple) else (body,)
    used = [model for model in (*bodies, reply, event, error if errors else None) if model]
    extra: Json = {COMPONENTS: [model_schemas(model) for model in used], ADMIN: is_admin}
    if is_keyed:
        extra["security"] = [{name: []} for name in SECURITY]
    if bodies:
        extra["requestBody"] = {"required": True, "content": as_json(*bodies)}
    return {"tags": [tag], "responses": responses, "openapi_extra": extra}


class DocumentedApp(FastAPI):
    """An application whose schema holds the models that its routes declare.

    Attributes:
        model_names: what requests may give as `model`.
        has_key: whether keyed endpoints ask for a key.
        has_admin: whether there is a key of an administrator.
    """

    model_names: list[str]
    has_key: bool
    has_admin: bool

    def openapi(self) -> Json:
        """The schema, made once."""
        if self.openapi_schema is None:
            schema = super().openapi()
            found = [one for path in schema["paths"].values() for one in path.values()]
            components: Json = {"schemas": collect(found)}
            if self.has_key or self.has_admin:
                components["securitySchemes"] = SECURITY
            for one in found:
                self._describe(one, components["schemas"])
            self.openapi_schema = {**schema, "components": components}
        return self.openapi_schema

    def _describe(self, operation: Json, models: Json) -> None:
        """Add what depends on the server's settings."""
        operation["responses"].pop("422", None)  # FastAPI's; they are 400 here
        if not (self.has_admin if operation.pop(ADMIN, False) else self.has_key):
            operation.pop("security", None)
            operation["responses"].pop("401", None)
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path" and parameter["name"] == "name":
                parameter["schema"] = {"type": "string", "enum": self.model_names}
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for one in content["schema"].get("oneOf", [content["schema"]]):
                name = one.get("$ref", "").rpartition("/")[2]
                properties = models[name]["properties"] if name else {}
                if "model" in properties:
                    properties["model"] = {"enum": [*self.model_names, None]}


def collect(operations: list[Json]) -> Json:
    """The schemas that operations kept, by name.

    Raises:
        InvariantError: two of them have the same name.
    """
    found: Json = {}
    for operation in operations:
        for models in operation.pop(COMPONENTS, ()):
            for name, schema in models.items():
                if found.setdefault(name, schema) != schema:
                    raise InvariantError(f"two schemas are called {name}: rename a model")
    return found


def describe_body(schema: Json, body: type[BaseModel]) -> None:
    """Add what pydantic does not know of a body: ranges, and what is neutral."""
    properties = schema["properties"]
    for name, found in properties.items():
        for kind in kinds(found):
            if name in BOUNDS and kind["type"] in ("integer", "number"):
                kind |= BOUNDS[name]
            kind |= SHAPES.get(name, {}).get(kind["type"], {})
    if properties.get("messages", {}).get("type") == "array":
        properties["messages"]["minItems"] = 1
    if body is CompletionBody:
        properties["max_tokens"]["anyOf"][0]["minimum"] = 0  # to score a prompt
        properties["prompt"], schema["required"] = PROMPT, ["prompt"]
    for name, (values, fix) in neutral_fields(body).items():
        properties.setdefault(name, {"enum": [None, *values], "description": fix})


def kinds(schema: Json) -> Iterator[Json]:
    """The schemas of the types that a value may have."""
    inner = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if not inner and "type" in schema:
        yield schema
    for one in inner:
        yield from kinds(one)


def neutral_fields(body: type[BaseModel]) -> dict[str, tuple[list[Any], str]]:
    """Fields that are not served: the values that ask for nothing, and what is said to others."""
    if issubclass(body, MappedBody):
        return {name: ([*no.neutral], no.fix) for name, no in body.REFUSALS.items()}
    if issubclass(body, GenerationBody):
        return {name: ([*values], "is not served") for name, values in NEUTRAL.items()}
    return {}
