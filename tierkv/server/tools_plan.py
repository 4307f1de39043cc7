"""What a request's tools mean for its prompt, its output, and how that is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tierkv.engine.grammar_params import WHITESPACE, StructuredOutputsParams
from tierkv.errors import RequestError
from tierkv.server.replies import Json
from tierkv.server.tools_body import Function, NamedChoice, Tool, ToolChoice
from tierkv.server.tools_parsers import PARSERS, CallParser, ListParser, NamedParser

HOW_TO_ENABLE = "start the server with --enable-auto-tool-choice and --tool-call-parser NAME"

Kind = Literal["none", "auto", "required", "named"]


@dataclass(slots=True, frozen=True)
class ToolPlan:
    """How one request treats tools.

    Attributes:
        kind: whether calls are impossible, possible, or forced.
        tools: those that the model is told of.
        name: the function that must be called.
        parser: name of the parser for calls that are not forced, and for writing earlier ones.
        is_parallel: one answer may hold several calls.
    """

    kind: Kind
    tools: Sequence[Tool]
    name: str | None
    parser: str
    is_parallel: bool

    @property
    def is_forced(self) -> bool:
        return self.kind in ("required", "named")

    @property
    def how(self) -> str:
        """How calls are written: the parser's name, or what the grammar makes them."""
        return self.kind if self.is_forced else self.parser

    def grammar(self) -> StructuredOutputsParams | None:
        """What guarantees that a forced call is one.

        Raises:
            RequestError: the schemas are too long.
        """
        if not self.is_forced:
            return None
        functions = [tool.function for tool in self.tools]
        try:
            if self.kind == "required":
                return StructuredOutputsParams(grammar=_grammar(functions, self.is_parallel))
            (schema,) = (f.schema_of_arguments() for f in functions if f.name == self.name)
            return StructuredOutputsParams(json=schema)
        except RequestError as error:
            raise RequestError("tools", error.value, error.fix) from None

    def make_parser(self) -> CallParser | None:
        """A parser for one answer; None when it is text whatever it holds."""
        if self.name is not None:
            return NamedParser(self.name)
        if self.kind == "required":
            return ListParser()
        names = frozenset(tool.function.name for tool in self.tools)
        return PARSERS[self.parser](names) if self.kind == "auto" else None

    def descriptions(self) -> list[Json]:
        """The tools as clients describe them and templates take them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def finish_reason(self, reason: str | None, *, has_calls: bool) -> str | None:
        """How an answer ended, in OpenAI's words: a named call ends with `stop`."""
        if reason == "stop" and has_calls and self.kind in ("auto", "required"):
            return "tool_calls"
        return reason


def plan_tools(
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    *,
    parser: str | None,
    is_auto_enabled: bool,
    is_parallel: bool,
) -> ToolPlan:
    """The plan for what a request says.

    Args:
        parser, is_auto_enabled: of the server.

    Raises:
        RequestError: calls that are not forced are to be found, and the server finds none.
    """
    name = choice.function.name if isinstance(choice, NamedChoice) else None
    kind: Kind = "named" if isinstance(choice, NamedChoice) else choice or "auto"
    if not tools:
        kind = "none"
    if kind == "auto" and (parser is None or not is_auto_enabled):
        raise RequestError("tool_choice", "auto", HOW_TO_ENABLE)
    return ToolPlan(kind, tools, name, parser or "hermes", is_parallel)


def _grammar(functions: list[Function], is_parallel: bool) -> str:
    """A list of calls in Lark's form; each function's schema is a grammar of its own."""
    numbers = range(len(functions))
    more = ' (", " call)*' if is_parallel else ""
    rules = [f'start: "[" call{more} "]"', "call: " + " | ".join(f"call_{i}" for i in numbers)]
    for i, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        schema = function.schema_of_arguments()
        given = schema.get("x-guidance")
        options = given if isinstance(given, dict) else {}
        schema["x-guidance"] = {"whitespace_pattern": WHITESPACE, **options}
        rules.append(f'call_{i}: {head} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)
