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

BESIDE_CALLS = (
    "cannot be combined with tools of which the model may choose, unless the server runs with "
    "--tool-call-parser hermes; or set tool_choice to none"
)
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

    def grammar(
        self, answer: StructuredOutputsParams | None = None
    ) -> StructuredOutputsParams | None:
        """What guarantees that a forced call is one, and that what is no call is the answer.

        Args:
            answer: the JSON that an answer without calls has to be.

        Raises:
            RequestError: the schemas are too long, or the parser's calls have no grammar.
        """
        functions = [tool.function for tool in self.tools]
        if self.kind == "auto" and answer is not None:
            if self.parser != "hermes":
                raise RequestError("response_format", "given", BESIDE_CALLS)
            lark = _answer_or_calls(answer, functions, self.is_parallel)
            return StructuredOutputsParams(grammar=lark)
        if not self.is_forced:
            return None
        try:
            if self.kind == "required":
                return StructuredOutputsParams(grammar=_list_of(functions, self.is_parallel))
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


def _list_of(functions: list[Function], is_parallel: bool) -> str:
    """A list of calls in Lark's form; each function's schema is a grammar of its own."""
    more = ' (", " call)*' if is_parallel else ""
    return "\n".join([f'start: "[" call{more} "]"', *_calls(functions)])


def _answer_or_calls(
    answer: StructuredOutputsParams, functions: list[Function], is_parallel: bool
) -> str:
    """The answer's JSON, or calls as the hermes parser reads them."""
    schema = {"type": "object"} if answer.json_object else json.loads(answer.spec()[1])
    more = r' ("\n" call)*' if is_parallel else ""
    rules = [f"start: answer | call{more}", f"answer: %json {_bounded(schema)}"]
    return "\n".join(rules + _calls(functions, "<tool_call>\n", "\n</tool_call>"))


def _calls(functions: list[Function], opening: str = "", closing: str = "") -> list[str]:
    """The rule `call`, and those that it needs."""
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = f'{opening}{{"name": {json.dumps(function.name)}, "arguments": '
        rules.append(f"call_{i}: {json.dumps(head)} arguments_{i} {json.dumps('}' + closing)}")
        rules.append(f"arguments_{i}: %json {_bounded(function.schema_of_arguments())}")
    return rules


def _bounded(schema: Json) -> str:
    """The schema as text, with as little white space as in other structured outputs."""
    given = schema.get("x-guidance")
    options = given if isinstance(given, dict) else {}
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, **options}})
