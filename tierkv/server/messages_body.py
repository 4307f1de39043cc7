"""What `/v1/messages` takes, in Anthropic's shapes, and the chat completion that it asks for."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Tag, model_validator

from tierkv.errors import RequestError
from tierkv.server.bodies import (
    LIST,
    TEXT,
    MappedBody,
    Part,
    Refusal,
    SamplingBody,
    TextOrList,
    Whole,
    by_field,
    by_type,
)
from tierkv.server.conversation import Conversation
from tierkv.server.replies import Json
from tierkv.server.tools_body import FunctionName, Parameters


class CacheControl(Part):
    """Where Anthropic's cache may end. Every prefix is cached here, so it changes nothing."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Part):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Json], Field(max_length=0)] | None = None


TextOrBlocks = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[TextBlock], Tag(LIST)], TextOrList
]


class Caller(Part):
    """Who made a call: always the model itself."""

    type: Literal["direct"]


class ToolUseBlock(Part):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Caller | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(Part):
    """What a call gave; the model sees `Error: ` before what is an error."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextOrBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    def text(self) -> str:
        """The result as the model sees it."""
        text = "" if self.content is None else text_of(self.content)
        return f"Error: {text}" if self.is_error else text


UserBlock = Annotated[
    Annotated[TextBlock, Tag("<block>")] | Annotated[ToolResultBlock, Tag("<result>")],
    by_type({"text": "<block>", "tool_result": "<result>"}),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<block>")] | Annotated[ToolUseBlock, Tag("<use>")],
    by_type({"text": "<block>", "tool_use": "<use>"}),
]


class UserMessage(Part):
    """A turn of the user; turns of the same role that follow each other are one."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag(TEXT)] | Annotated[list[UserBlock], Field(min_length=1), Tag(LIST)],
        TextOrList,
    ]


class AssistantMessage(Part):
    """A turn of the assistant; the reply continues one that comes last."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag(TEXT)] | Annotated[list[AssistantBlock], Field(min_length=1), Tag(LIST)],
        TextOrList,
    ]


class SystemMessage(Part):
    """Instructions between the turns."""

    role: Literal["system"]
    content: Annotated[
        Annotated[str, Tag(TEXT)] | Annotated[list[TextBlock], Field(min_length=1), Tag(LIST)],
        TextOrList,
    ]


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    by_field("role", {"user": "<user>", "assistant": "<assistant>", "system": "<system>"}),
]


class ClientTool(Part):
    """A tool that the model may call; inputs always stream as they come."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: Parameters
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    cache_control: CacheControl | None = None


class ToolMode(Part):
    """Whether tools are called, or which one."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class ToolByName(Part):
    """The tool that must be called."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class JsonFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """The form of the answer."""

    format: JsonFormat | None = None


class Metadata(Part):
    """Who asks; it changes nothing."""

    user_id: str | None = None


CHOICE_TAGS = {"auto": "<choice>", "any": "<choice>", "none": "<choice>", "tool": "<tool>"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class PromptBody(MappedBody):
    """Body of `/v1/messages/count_tokens`: what becomes the prompt."""

    REFUSALS: ClassVar[dict[str, Refusal]] = {
        "thinking": Refusal(neutral=({"type": "disabled"},)),
        "service_tier": Refusal(neutral=("auto", "standard_only")),
        "speed": Refusal(neutral=("standard",)),
        "mcp_servers": Refusal(neutral=([],)),
        "container": Refusal("is not served: nothing is kept here"),
        "context_management": Refusal(neutral=({}, {"edits": []})),
        "inference_geo": Refusal(),
        "diagnostics": Refusal(),
        "user_profile_id": Refusal(),
    }
    RENAMES: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"(prompt|messages)\b.*", "messages"),
        (r"stop$", "stop_sequences"),
        (r"response_format(\.json_schema)?", "output_config.format"),
        (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
        (r"(tools\[\d+\]|tool_choice)\.function", r"\1"),
        (r"parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    )

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    system: TextOrBlocks | None = None
    tools: list[ClientTool] | None = None
    tool_choice: (
        Annotated[
            Annotated[ToolMode, Tag("<choice>")] | Annotated[ToolByName, Tag("<tool>")],
            by_type(CHOICE_TAGS),
        ]
        | None
    ) = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="after")
    def check_the_end(self) -> Self:
        """A call that nobody answered cannot be continued."""
        last = self.messages[-1].content
        block = last[-1] if isinstance(last, list) else None
        if isinstance(block, ToolUseBlock):
            fix = "ends with a tool_use: add a message of the user with its tool_result"
            raise RequestError(f"messages[{len(self.messages) - 1}]", block.name, fix)
        return self

    def chat_fields(self) -> Json:
        """The fields of the chat completion."""
        continues = self.messages[-1].role == "assistant"
        return {
            "chat_template_kwargs": self.chat_template_kwargs,
            "messages": self.chat_messages(),
            "add_generation_prompt": not continues,
            "continue_final_message": continues,
            "response_format": self._response_format(),
            **self._tool_fields(),
        }

    def chat_messages(self) -> list[Json]:
        """The conversation as chat completions write it."""
        conversation = Conversation()
        if self.system:
            conversation.say("system", text_of(self.system))
        for message in self.messages:
            if isinstance(message.content, str):
                conversation.say(message.role, message.content, joins=True)
                continue
            for block in message.content:
                add_block(conversation, message.role, block)
        return conversation.messages

    def _response_format(self) -> Json | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        schema = {"name": "output", "schema": self.output_config.format.json_schema}
        return {"type": "json_schema", "json_schema": {**schema, "strict": True}}

    def _tool_fields(self) -> Json:
        choice = self.tool_choice
        chosen: Any = None
        if isinstance(choice, ToolByName):
            chosen = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            chosen = CHOICES[choice.type]
        is_single = choice is not None and choice.disable_parallel_tool_use
        return {
            "tools": [as_function(tool) for tool in self.tools or ()],
            "tool_choice": chosen,
            "parallel_tool_calls": False if is_single else None,
        }


class MessagesBody(PromptBody, SamplingBody):
    """Body of `/v1/messages`, with sampling fields of completions as extras."""

    max_tokens: Whole
    stop_sequences: list[str] | None = None
    metadata: Metadata | None = None
    stream: bool | None = None

    def chat_fields(self) -> Json:
        """The fields of the chat completion."""
        ends = {"max_tokens": self.max_tokens, "stop": self.stop_sequences}
        return {**super().chat_fields(), **self.sampling_fields(), **ends}


def add_block(
    conversation: Conversation, role: str, block: TextBlock | ToolUseBlock | ToolResultBlock
) -> None:
    """Add one block of a message."""
    if isinstance(block, TextBlock):
        conversation.say(role, block.text, joins=True)
    elif isinstance(block, ToolUseBlock):
        conversation.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
    else:
        conversation.result(block.tool_use_id, block.text())


def as_function(tool: ClientTool) -> Json:
    """A tool as chat completions write it."""
    given = {"description": tool.description, "strict": tool.strict}
    options = {name: value for name, value in given.items() if value is not None}
    function = {"name": tool.name, **options, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def text_of(content: str | list[TextBlock]) -> str:
    """The content as one text: a line for each block."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
