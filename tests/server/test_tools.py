"""Tools in requests: what is checked, what the prompt says of them, what a forced call must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live_app import LiveApp
from text_models import byte_tokenizer

from tierkv.engine.grammar import GrammarCompiler, make_vocabulary
from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import RequestError
from tierkv.server.parsing import parse_body
from tierkv.server.protocol import ChatBody
from tierkv.server.tools_plan import ToolPlan, plan_tools
from tierkv.server.tools_prompt import prompt_with_tools, template_text, with_known_roles
from tierkv.server.tools_reply import ToolTurn

USER = {"role": "user", "content": "hi"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
NAMED = {"type": "function", "function": {"name": "stop"}}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}


def chat(**fields: Any) -> ChatBody:
    return parse_body(json.dumps({"messages": [USER], **fields}).encode(), ChatBody)


def plan(body: ChatBody, parser: str | None = "hermes", is_auto_enabled: bool = True) -> ToolPlan:
    return plan_tools(
        body.tools or [],
        body.tool_choice,
        parser=parser,
        is_auto_enabled=is_auto_enabled,
        is_parallel=body.parallel_tool_calls is not False,
    )


# -- the body --------------------------------------------------------------------------------------


PARAMETERS_TYPE = "tools[0].function.parameters.type"


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": fields}]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": function()}, "tools[0].function.name"),
        ({"tools": function(name="a b")}, "tools[0].function.name"),
        ({"tools": function(name="f", parameters=[])}, "tools[0].function.parameters"),
        ({"tools": function(name="f", parameters={"type": "string"})}, PARAMETERS_TYPE),
        ({"tools": [STOP, STOP]}, "tools[1].function.name"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tools": [STOP], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [STOP], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [STOP], "tool_choice": 5}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [STOP], "tool_choice": "required", "guided_regex": "a"},
            "guided_regex",
        ),
        (
            {
                "tools": [STOP],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
        (
            {"tools": [STOP], "tool_choice": NAMED, "use_beam_search": True},
            "tool_choice",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.field == field


def test_a_form_and_tools_that_are_not_called_go_together() -> None:
    json_object = {"type": "json_object"}
    body = chat(tools=[STOP], tool_choice="none", response_format=json_object)
    assert body.params().structured_outputs is not None
    assert chat(tools=[STOP], guided_regex="a").params().structured_outputs is not None


def test_messages_of_calls_and_results_reach_the_template() -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    called, given = chat(messages=[USER, answer, result]).template_input()[1:]
    assert called["content"] == ""
    assert called["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert given == result


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", '"x"'])
def test_arguments_of_earlier_calls_are_objects(arguments: str) -> None:
    bad = {**CALL, "function": {"name": "f", "arguments": arguments}}
    body = chat(messages=[USER, {"role": "assistant", "tool_calls": [bad]}])
    with pytest.raises(RequestError) as caught:
        body.template_input()
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "none"),
        ({"tools": []}, "none"),
        ({"tools": [], "tool_choice": "auto"}, "none"),
        ({"tools": [STOP]}, "auto"),
        ({"tools": [STOP], "tool_choice": "none"}, "none"),
        ({"tools": [STOP], "tool_choice": "required"}, "required"),
        ({"tools": [STOP], "tool_choice": NAMED}, "named"),
    ],
    ids=str,
)
def test_the_kinds_of_plans(fields: dict[str, Any], kind: str) -> None:
    assert plan(chat(**fields)).kind == kind


@pytest.mark.parametrize(("parser", "enabled"), [(None, False), ("hermes", False), (None, True)])
def test_auto_needs_a_parser_and_forced_calls_do_not(parser: str | None, enabled: bool) -> None:
    with pytest.raises(RequestError, match="--enable-auto-tool-choice") as caught:
        plan(chat(tools=[STOP]), parser, enabled)
    assert caught.value.field == "tool_choice"
    for choice in ("none", "required", NAMED):
        plan(chat(tools=[STOP], tool_choice=choice), parser, enabled)


def test_grammars_of_forced_calls() -> None:
    vocabulary = make_vocabulary(Tokenizer(byte_tokenizer()), 300, [0])
    compiler = GrammarCompiler(lambda: vocabulary)

    def accepts(body: ChatBody, text: str) -> bool:
        grammar = plan(body).grammar()
        assert grammar is not None
        matcher = compiler.compile(grammar).start()
        return (
            bool(matcher.consume_tokens(vocabulary.tokenize_str(text))) and matcher.is_accepting()
        )

    both: dict[str, Any] = {"tools": [WEATHER, STOP]}
    required = chat(**both, tool_choice="required")
    weather = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
    stop = '{"name": "stop", "arguments": {}}'
    assert accepts(required, f"[{weather}]")
    assert accepts(required, f"[{stop}, {weather}, {stop}]")
    assert not accepts(required, "[]")
    assert not accepts(required, '[{"name": "other", "arguments": {}}]')
    assert not accepts(required, '[{"name": "get_weather", "arguments": {"city": "Florence"}}]')
    alone = chat(**both, tool_choice="required", parallel_tool_calls=False)
    assert accepts(alone, f"[{stop}]")
    assert not accepts(alone, f"[{stop}, {stop}]")
    named = chat(**both, tool_choice={**NAMED, "function": {"name": "get_weather"}})
    assert accepts(named, '{"city": "Rome"}')
    assert not accepts(named, "{}")
    odd = function(name="f", parameters={"x-guidance": 5, "properties": {"a": {"const": 1}}})
    assert accepts(
        chat(tools=odd, tool_choice="required"), '[{"name": "f", "arguments": {"a": 1}}]'
    )
    compiler.close()


def test_answers_have_their_form_beside_calls() -> None:
    vocabulary = make_vocabulary(Tokenizer(byte_tokenizer()), 300, [0])
    compiler = GrammarCompiler(lambda: vocabulary)

    def accepts(body: ChatBody, text: str) -> bool:
        grammar = plan(body).grammar(body.form_of_answers)
        assert grammar is not None
        matcher = compiler.compile(grammar).start()
        tokens = vocabulary.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = chat(tools=[WEATHER, STOP], response_format=form)
    weather = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    stop = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    for text in ('{"a": 1}', weather, f"{weather}\n{stop}"):
        assert accepts(body, text)
    for text in ("", '{"a": 2}', '{"a": 1}' + stop, stop.replace("stop", "go"), "hello"):
        assert not accepts(body, text)
    single = chat(tools=[STOP], response_format={"type": "json_object"}, parallel_tool_calls=False)
    assert accepts(single, '{"b": []}') and accepts(single, stop)
    assert not accepts(single, f"{stop}\n{stop}")
    compiler.close()
    with pytest.raises(RequestError, match="--tool-call-parser hermes") as caught:
        plan(body, parser="pythonic").grammar(body.form_of_answers)
    assert caught.value.field == "response_format"
    whole = chat(tools=[STOP], guided_regex="a")
    assert plan(whole).grammar(whole.form_of_answers) is None


def test_schemas_that_are_too_long_name_the_tools() -> None:
    wide = {"type": "object", "properties": {"p" * 200 + str(i): {} for i in range(1000)}}
    body = chat(tools=function(name="f", parameters=wide), tool_choice="required")
    with pytest.raises(RequestError, match="characters long") as caught:
        plan(body).grammar()
    assert caught.value.field == "tools"


# -- the prompt ------------------------------------------------------------------------------------

PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOL_TEMPLATE = PLAIN_TEMPLATE + "{{ tools }}{% for m in messages %}{{ m.tool_calls }}{% endfor %}"


def history() -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    messages = [{"role": "system", "content": "Be brief."}, USER, answer, result]
    return chat(messages=messages).template_input()


def test_a_template_that_knows_tools_gets_them() -> None:
    body = chat(tools=[WEATHER, STOP])
    messages, tools = prompt_with_tools(history(), plan(body), TOOL_TEMPLATE)
    assert messages == history()
    assert tools == [WEATHER, STOP]


@pytest.mark.parametrize(
    ("parser", "call"),
    [
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n'),
        ("pythonic", "[get_weather(city='Rome')]"),
    ],
)
def test_other_templates_get_words(parser: str, call: str) -> None:
    messages, tools = prompt_with_tools(
        history(), plan(chat(tools=[WEATHER, STOP]), parser), PLAIN_TEMPLATE
    )
    assert tools == []
    system, user, answer, result = messages
    assert json.dumps(WEATHER) in system["content"]
    assert system["content"].endswith("\n\nBe brief.")
    assert user == USER
    assert answer["content"].startswith("Let me see.\n")
    assert call in answer["content"]
    assert result == {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"}
    # What the prompt shows of a call is what the parser reads.
    turn_plan = plan(chat(tools=[WEATHER]), parser)
    found = turn_plan.make_parser()
    assert found is not None
    shown = answer["content"].removeprefix("Let me see.\n")
    delta = ToolTurn(found, is_parallel=True).read(shown, is_over=True)
    assert json.loads(delta["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome"}


def test_results_alone_are_told_in_words_too() -> None:
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    (told,), tools = prompt_with_tools([result], plan(chat()), PLAIN_TEMPLATE)
    assert (told["role"], tools) == ("user", []) and "sunny" in told["content"]


def test_words_for_forced_calls_and_for_none() -> None:
    def system(**fields: Any) -> str:
        messages, _ = prompt_with_tools([USER], plan(chat(tools=[STOP], **fields)), PLAIN_TEMPLATE)
        return str(messages[0]["content"]) if len(messages) > 1 else ""

    assert "list of calls as JSON" in system(tool_choice="required")
    assert "arguments for stop" in system(tool_choice=NAMED)
    assert system(tool_choice="none") == ""


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (PLAIN_TEMPLATE, "system"),
        ("{% if m.role == 'developer' %}", "developer"),
        (None, "developer"),
    ],
)
def test_developers_are_the_system_for_templates_that_do_not_know_them(
    template: str | None, role: str
) -> None:
    messages = [{"role": "developer", "content": "a"}, USER]
    assert with_known_roles(messages, template) == [{"role": role, "content": "a"}, USER]


def test_without_tools_and_calls_nothing_changes() -> None:
    assert prompt_with_tools([USER], plan(chat()), PLAIN_TEMPLATE) == ([USER], [])


def test_which_template_is_asked() -> None:
    tokenizer = byte_tokenizer()
    assert template_text(Tokenizer(tokenizer), None) == tokenizer.chat_template
    assert template_text(Tokenizer(tokenizer), "mine") == "mine"
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert template_text(Tokenizer(tokenizer), None) == "b"
    tokenizer.chat_template = None
    assert template_text(Tokenizer(tokenizer), None) is None
    assert template_text(None, None) is None


# -- the server without a parser -------------------------------------------------------------------


def test_forced_calls_need_no_parser(app: LiveApp) -> None:
    response = app.post(
        "chat/completions",
        messages=[USER],
        tools=[WEATHER, STOP],
        tool_choice={**NAMED, "function": {"name": "get_weather"}},
    )
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"  # as OpenAI: what was forced is no news
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}


def test_a_schema_that_does_not_compile_is_400(app: LiveApp) -> None:
    bad = function(name="f", parameters={"properties": {"x": {"type": "objec"}}})
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        response = app.post("chat/completions", messages=[USER], tools=bad, tool_choice=choice)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
