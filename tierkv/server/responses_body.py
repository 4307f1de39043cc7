"""What `/v1/responses` takes, and the chat completion that it asks for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from tierkv.server.bodies import (
    LIST,
    TEXT,
    Part,
    Refusal,
    SamplingBody,
    Stop,
    TextOrList,
    Whole,
    by_type,
)
from tierkv.server.conversation import Conversation
from tierkv.server.replies import Json
from tierkv.server.tools_body import FunctionName, Parameters

NOT_KEPT = "responses are not kept here: send the earlier items in `input` again"


class InputText(Part):
    """Text that the model reads."""

    type: Literal["input_text", "text"]
    text: str


class OutputText(Part):
    """Text of an earlier answer, as it came."""

    type: Literal["output_text"]
    text: str
    annotations: list[Json] | None = None
    logprobs: list[Json] | None = None


ContentPart = Annotated[
    Annotated[InputText, Tag("<input>")] | Annotated[OutputText, Tag("<output>")],
    by_type({"input_text": "<input>", "output_text": "<output>", "text": "<input>"}),
]
Content = Annotated[Annotated[str, Tag(TEXT)] | Annotated[list[ContentPart], Tag(LIST)], TextOrList]


class ResponseMessage(Part):
    """A message; `developer` is another word for `system`."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(Part):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutputItem(Part):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    name: str | None = None
    id: str | None = None
    status: str | None = None


ITEM_TAGS = {
    "message": "<message>",
    "function_call": "<call>",
    "function_call_output": "<output>",
}
Item = Annotated[
    Annotated[ResponseMessage, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<call>")]
    | Annotated[FunctionCallOutputItem, Tag("<output>")],
    by_type(ITEM_TAGS, default="message"),
]
Input = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[Item], Field(min_length=1), Tag(LIST)], TextOrList
]


class PlainFormat(Part):
    """Text of any form, or any JSON object."""

    type: Literal["text", "json_object"] = "text"


class SchemaFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    name: str
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


Format = Annotated[
    Annotated[PlainFormat, Tag("<plain>")] | Annotated[SchemaFormat, Tag("<schema>")],
    by_type(
        {"text": "<plain>", "json_object": "<plain>", "json_schema": "<schema>"}, default="text"
    ),
]


class TextOptions(Part):
    """The form of the answer's text."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(Part):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class FunctionChoice(Part):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class ResponseStreamOptions(Part):
    """There is no obfuscation to turn off."""

    include_obfuscation: Literal[False] | None = None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)]
    | Annotated[FunctionChoice, Tag("<tool>")],
    Discriminator(
        lambda value: TEXT if isinstance(value, str) else "<tool>",
    ),
]


class ResponsesBody(SamplingBody):
    """Body of `/v1/responses`, with the sampling fields of completions as extras."""

    REFUSALS: ClassVar[dict[str, Refusal]] = {
        "previous_response_id": Refusal(NOT_KEPT),
        "conversation": Refusal(NOT_KEPT),
        "background": Refusal("is not served: use stream=true", neutral=(False,)),
        "truncation": Refusal(
            "input is never cut here: leave earlier items out", neutral=("disabled",)
        ),
        "reasoning": Refusal(neutral=({}, {"effort": "none"})),
        "service_tier": Refusal(neutral=("auto", "default")),
        "prompt_cache_retention": Refusal(neutral=("in_memory",)),
        "context_management": Refusal(neutral=([],)),
        "prompt": Refusal("prompts are not kept here: send `instructions` and `input`"),
        "prompt_cache_options": Refusal(),
        "moderation": Refusal(),
    }
    RENAMES: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"(prompt|messages)\b.*", "input"),
        (r"max_tokens$", "max_output_tokens"),
        (r"(top_)?logprobs$", "top_logprobs"),
        (r"response_format(\.json_schema)?", "text.format"),
        (r"(tools\[\d+\]|tool_choice)\.function", r"\1"),
    )

    model: str | None = None
    input: Input
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    max_tool_calls: Whole | None = None
    stop: Stop | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    top_logprobs: Whole | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def chat_fields(self) -> Json:
        """The fields of the chat completion."""
        includes_logprobs = "message.output_text.logprobs" in (self.include or ())
        wants_logprobs = self.top_logprobs is not None or includes_logprobs
        return {
            **self.sampling_fields(),
            "chat_template_kwargs": self.chat_template_kwargs,
            "messages": self.messages(),
            "max_tokens": self.max_output_tokens,
            "stop": self.stop,
            "logprobs": wants_logprobs or None,
            "top_logprobs": self.top_logprobs,
            "response_format": self._response_format(),
            **self._tool_fields(),
        }

    def messages(self) -> list[Json]:
        """The conversation as chat completions write it."""
        conversation = Conversation()
        if self.instructions:
            conversation.say("system", self.instructions)
        if isinstance(self.input, str):
            conversation.say("user", self.input)
            return conversation.messages
        for item in self.input:
            if isinstance(item, FunctionCallItem):
                conversation.call(item.call_id, item.name, item.arguments)
            elif isinstance(item, FunctionCallOutputItem):
                conversation.result(item.call_id, text_of(item.output))
            else:
                role = "system" if item.role == "developer" else item.role
                conversation.say(role, text_of(item.content))
        return conversation.messages

    def text_format(self) -> Json:
        """`text` as the reply shows it."""
        given = self.text.format if self.text is not None else None
        shown = given.model_dump(by_alias=True, exclude_none=True) if given else {"type": "text"}
        return {"format": shown, "verbosity": "medium"}

    def _response_format(self) -> Json | None:
        given = self.text.format if self.text is not None else None
        if isinstance(given, SchemaFormat):
            schema = given.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
            return {"type": "json_schema", "json_schema": schema}
        return None if given is None else {"type": given.type}

    def _tool_fields(self) -> Json:
        choice: Any = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        tools = self.tools or ()
        functions = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in tools]
        return {
            "tools": [{"type": "function", "function": function} for function in functions],
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
        }


def text_of(content: str | list[InputText | OutputText]) -> str:
    """The content as one text: a line for each part."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
