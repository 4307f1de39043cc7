"""Messages and tools as clients write them: what was said and called, what may or must be."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator

from tierkv.engine.inputs import join_text_parts
from tierkv.errors import RequestError
from tierkv.server.fields import EMPTY, LIST, TEXT, Model, TextOrList, Whole
from tierkv.server.replies import Json

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
FunctionName = Annotated[str, Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})]
Parameters = Annotated[
    dict[str, Any], Field(json_schema_extra={"properties": {"type": {"const": "object"}}})
]
"""The JSON schema of a function's arguments, which are an object."""

TEXT_PARTS: Json = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
Content = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[dict[str, Any]], WithJsonSchema(TEXT_PARTS), Tag(LIST)],
    TextOrList,
]
CALLS: Json = {"type": "array", "minItems": 1}
SAYS_SOMETHING: Json = {
    "additionalProperties": {"enum": list(EMPTY)},
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
        {"required": ["tool_calls"], "properties": {"tool_calls": CALLS}},
    ],
}
"""What a message's JSON schema adds to its fields."""


class Function(Model):
    """A function that the model may call; `strict` is always so where a call is forced."""

    name: FunctionName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None

    def schema_of_arguments(self) -> Json:
        """The JSON schema of its arguments, an object."""
        return {"type": "object", **(self.parameters or {"properties": {}})}


class Tool(Model):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Model):
    """Which function."""

    name: str


class NamedChoice(Model):
    """The function that the model must call."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedChoice, Tag("<function>")],
    Discriminator(lambda value: "<mode>" if isinstance(value, str) else "<function>"),
]


class FunctionCall(Model):
    """A function and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Model):
    """A call that the model made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Whole | None = None

    def as_template_input(self, place: str) -> Json:
        """The call as chat templates take it: with arguments as an object, not as text."""
        text, where = self.function.arguments or "{}", f"{place}.function.arguments"
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(where, text, f"is no JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise RequestError(where, text, "must be a JSON object")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Model):
    """One message of a conversation; content is text or a list of text parts."""

    model_config = ConfigDict(json_schema_extra=SAYS_SOMETHING)

    role: str
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_what_says_nothing(cls, values: Any) -> Any:
        """Leave out empty fields of an answer that a client sends back (`refusal: null`)."""
        if not isinstance(values, dict):
            return values
        served = cls.model_fields
        return {
            name: value for name, value in values.items() if name in served or value not in EMPTY
        }

    def as_template_input(self, place: str) -> Json:
        """The message as chat templates take it: text parts joined by newlines."""
        if self.content is None and not self.tool_calls:
            raise RequestError(f"{place}.content", None, "must be text")
        message: Json = {"role": self.role, "content": self.content or ""}
        if isinstance(self.content, list):
            message["content"] = join_text_parts(self.content, f"{place}.content")
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [
                call.as_template_input(f"{place}.tool_calls[{i}]")
                for i, call in enumerate(self.tool_calls)
            ]
        return message


def check_tools(tools: list[Tool], choice: ToolChoice | None) -> None:
    """Refuse names that are wrong or given twice, and a choice of none of the tools.

    Raises:
        RequestError: naming the field.
    """
    names: list[str] = []
    for i, tool in enumerate(tools):
        name, where = tool.function.name, f"tools[{i}].function.name"
        if _NAME.fullmatch(name) is None:
            fix = "must be 1 to 64 letters, digits, underscores, dots and hyphens"
            raise RequestError(where, name, fix)
        if name in names:
            raise RequestError(where, name, "is the name of another tool too")
        names.append(name)
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            where = f"tools[{i}].function.parameters.type"
            raise RequestError(where, kind, "must be object: a function's arguments have names")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        fix = f"is none of the tools: {', '.join(names) or 'there are none'}"
        raise RequestError("tool_choice.function.name", choice.function.name, fix)
    if choice == "required" and not names:
        raise RequestError("tool_choice", choice, "needs tools")
