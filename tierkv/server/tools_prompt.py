"""How a prompt is written for a template that knows less than the API, tools above all.

A chat template that knows tools is given them. For one that does not (it mentions neither `tools`
nor `tool_calls`), the conversation is rewritten in words that any template can render: a text about
the tools goes to the front of the system message, calls made earlier are written as the parser
reads them, and what they gave comes as messages of the user. The role `developer` becomes `system`
for a template that does not mention it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tierkv.engine.tokenizer import Tokenizer
from tierkv.server.replies import Json
from tierkv.server.tools_plan import ToolPlan

_KNOWS_TOOLS = re.compile(r"\btools\b")
_KNOWS_DEVELOPERS = re.compile(r"\bdeveloper\b")
_KNOWS_CALLS = re.compile(r"\btool_calls\b")

_LIST = """\
You may call the functions described here as JSON, one in each line:
<tools>
{tools}
</tools>
"""
_HOW = {
    "hermes": """\
To call one, write its name and its arguments as a JSON object within these tags:
<tool_call>
{"name": "the function's name", "arguments": {"the argument's name": "its value"}}
</tool_call>""",
    "pythonic": """\
To call functions, answer with nothing but a list of calls as Python writes them:
[name_of_function(argument="value"), name_of_another(argument=1)]""",
    "required": """\
Answer with nothing but a list of calls as JSON:
[{"name": "the function's name", "arguments": {"the argument's name": "its value"}}]""",
}
_NAMED = "Answer with nothing but the arguments for {name}, as a JSON object."


def prompt_with_tools(
    messages: list[Json], plan: ToolPlan, template: str | None
) -> tuple[list[Json], list[Json]]:
    """Messages and tools for the chat template; no tools when the messages speak of them.

    Args:
        messages: as the template would take them.
        plan: which tools there are, and what is to become of them.
        template: its source, from `template_text`.
    """
    tools = plan.descriptions()
    if knows(template, messages, has_tools=bool(tools)):
        return messages, tools
    return in_words(messages, [] if plan.kind == "none" else tools, plan.how, plan.name), []


def knows(template: str | None, messages: list[Json], *, has_tools: bool) -> bool:
    """Whether a chat template renders the tools, and the calls, of these messages."""
    if template is None:
        return True  # whoever renders it says that there is none
    has_calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
    return not (
        (has_tools and _KNOWS_TOOLS.search(template) is None)
        or (has_calls and _KNOWS_CALLS.search(template) is None)
    )


def with_known_roles(messages: list[Json], template: str | None) -> list[Json]:
    """The messages with `system`, OpenAI's older word, for a `developer` of whom the template
    knows nothing."""
    if template is None or _KNOWS_DEVELOPERS.search(template) is not None:
        return messages
    return [
        {**message, "role": "system"} if message["role"] == "developer" else message
        for message in messages
    ]


def template_text(tokenizer: Tokenizer | None, given: str | None) -> str | None:
    """The chat template that renders a conversation with tools; None when there is none."""
    if given is not None or tokenizer is None:
        return given
    found: Any = getattr(tokenizer.hf, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("tool_use") or found.get("default")
    return found if isinstance(found, str) else None


def in_words(messages: list[Json], tools: list[Json], how: str, name: str | None) -> list[Json]:
    """The conversation for a template that knows no tools.

    Args:
        messages: as the template would take them.
        tools: OpenAI's descriptions; empty when the model shall not call any.
        how: the parser's name, `required` for a JSON list of calls, `named` for one's arguments.
        name: the function that must be called, if there is one.
    """
    plain = [_plain(message, how) for message in messages]
    if not tools:
        return plain
    text = _LIST.format(tools="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))
    text += _NAMED.format(name=name) if name is not None else _HOW[how]
    if plain and plain[0]["role"] in ("system", "developer"):
        content = f"{text}\n\n{plain[0]['content']}"
        return [{**plain[0], "content": content}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: Json, how: str) -> Json:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    written = _as_python(functions) if how == "pythonic" else _as_tags(functions)
    content = "\n".join(part for part in (message["content"], written) if part)
    return {"role": message["role"], "content": content}


def _as_tags(functions: list[Json]) -> str:
    texts = (json.dumps(function, ensure_ascii=False) for function in functions)
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def _as_python(functions: list[Json]) -> str:
    calls = []
    for function in functions:
        values = ", ".join(f"{name}={value!r}" for name, value in function["arguments"].items())
        calls.append(f"{function['name']}({values})")
    return f"[{', '.join(calls)}]"
