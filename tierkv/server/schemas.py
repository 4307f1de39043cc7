"""What the server answers, as models for the OpenAPI schema; the replies are plain objects."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

# -- errors ----------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """`param` is the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What goes wrong, as OpenAI says it."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """The message begins with the field that is wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "timeout_error",
        "api_error",
    ]
    message: str


class AnthropicError(BaseModel):
    """What goes wrong, as Anthropic says it."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None


# -- the server ------------------------------------------------------------------------------------


class Version(BaseModel):
    """The version of tierkv."""

    version: str


class Load(BaseModel):
    """Sequences in flight."""

    server_load: int


class ModelCard(BaseModel):
    """A name that requests may use; `root` is the model that it stands for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    """All names."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(BaseModel):
    """A prompt's tokens; `token_strs` as the vocabulary writes them, if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The text of tokens."""

    prompt: str


# -- completions -----------------------------------------------------------------------------------

FinishReason = Literal["stop", "length", "tool_calls", "abort"]
LogprobsByToken = dict[str, float]


class PromptLogprob(BaseModel):
    """A candidate for a position of the prompt; 1 is the likeliest's rank."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt the candidates by token id; null for the first."""


class PromptTokensDetails(BaseModel):
    """Prompt tokens that were not computed again, together and by tier, and those that were."""

    cached_tokens: int
    gpu_tokens: int
    cpu_tokens: int
    nvme_tokens: int
    computed_tokens: int


class CompletionUsage(BaseModel):
    """Token counts over all prompts and samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens; null where there are none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[LogprobsByToken | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One sample of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    """The answers to one or several prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ContentLogprob] | None


class CalledFunction(BaseModel):
    """A function and its arguments as JSON."""

    name: str
    arguments: str


class ChatToolCall(BaseModel):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """An answer: text, calls of tools, or both."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ChatToolCall] | None = None


class ChatChoice(BaseModel):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChunkChoice(BaseModel):
    """What is new of one sample."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChunk(BaseModel):
    """What is new of a completion; the last event is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: CompletionUsage | None = None


class ChatDelta(BaseModel):
    """What an answer grew by."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChunkChoice(BaseModel):
    """What is new of one sample."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """What is new of a chat completion; the last event is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
    prompt_token_ids: list[int] | None = None


# -- responses -------------------------------------------------------------------------------------

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ResponseText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ContentLogprob]


class ResponseMessageItem(BaseModel):
    """A message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[ResponseText]


class ResponseFunctionCallItem(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class InputTokensDetails(PromptTokensDetails):
    """As of chat completions; what is computed is always cached, and not counted again."""

    cache_write_tokens: Literal[0]


class OutputTokensDetails(BaseModel):
    """There is no reasoning apart from the text."""

    reasoning_tokens: Literal[0]


class ResponseUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """A response: items, and what it repeats of the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ResponseMessageItem | ResponseFunctionCallItem]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]


class ResponseEvent(BaseModel):
    """One event of a response's stream; other fields depend on the type."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int


# -- messages --------------------------------------------------------------------------------------


class TextBlockReply(BaseModel):
    """Text."""

    type: Literal["text"]
    text: str


class ToolUseBlockReply(BaseModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(BaseModel):
    """The prompt is `input_tokens` that were computed and `cache_read_input_tokens` that were not.

    What is computed is always cached, so `cache_creation_input_tokens` says nothing of its own.
    """

    input_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(BaseModel):
    """The assistant's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlockReply | ToolUseBlockReply]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """Tokens of a prompt."""

    input_tokens: int


class MessageEvent(BaseModel):
    """One event of a message's stream; other fields depend on the type."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
