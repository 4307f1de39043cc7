"""Messages between front end and engine process: msgpack arrays, `[kind, *fields]`.

    to the engine                        from the engine
    start     options                    ready     engine info
    add       request                    failed    error            (start-up)
    abort     [request ids]              outputs   [sequence outputs of one step]
    stop      request id, index          rejected  request id, error
    call      call id, name, arguments   result    call id, value
                                         refused   call id, error
    shutdown                             dead      error            (its last words)

Log-probabilities travel as flat `[token id, logprob, rank, ...]` per position; errors as their
class name and arguments, so that a RequestError arrives as a RequestError.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack

from tierkv.config import EngineConfig
from tierkv.engine.beam import BeamSearchParams
from tierkv.engine.core import EngineInfo, EngineRequest
from tierkv.engine.kv_hints import KvHints
from tierkv.engine.outputs import PromptSources, RequestMetrics, SequenceOutput
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import (
    CapacityError,
    ConfigError,
    ConflictError,
    EngineDeadError,
    InvariantError,
    NotFoundError,
    QueueFullError,
    RequestError,
    TierkvError,
    UnsupportedModelError,
)
from tierkv.types import FinishReason, Logprob, PositionLogprobs

_ERRORS: dict[str, type[TierkvError]] = {
    cls.__name__: cls
    for cls in (
        CapacityError,
        ConfigError,
        ConflictError,
        EngineDeadError,
        InvariantError,
        NotFoundError,
        QueueFullError,
        RequestError,
        UnsupportedModelError,
    )
}
_PARAMS = {field.name: field for field in dataclasses.fields(SamplingParams)}
_Packed = list[Any]


def pack(kind: str, *values: Any) -> bytes:
    """One message.

    Raises:
        RequestError: a value does not fit the format (an integer beyond 64 bits, a string that
            is not Unicode).
    """
    try:
        packed: bytes = msgpack.packb([kind, *values])
    except (OverflowError, TypeError, ValueError) as error:
        raise RequestError("request", f"<{kind}>", f"cannot be sent: {error}") from None
    return packed


def unpack(message: bytes) -> tuple[str, _Packed]:
    """Kind and fields of a message."""
    kind, *values = msgpack.unpackb(message, strict_map_key=False)
    return kind, values


def encode_config(config: EngineConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def encode_info(info: EngineInfo) -> dict[str, Any]:
    return dataclasses.asdict(info)


def decode_info(values: dict[str, Any]) -> EngineInfo:
    return EngineInfo(**values)


def encode_request(request: EngineRequest) -> _Packed:
    params = {name: getattr(request.params, name) for name in _PARAMS}
    if request.params.structured_outputs is not None:
        params["structured_outputs"] = request.params.structured_outputs.as_message()
    return [
        request.request_id,
        request.prompt_token_ids,
        params,
        request.priority,
        request.cache_salt,
        request.is_stepped,
        request.tenant,
        None if request.hints is None else dataclasses.asdict(request.hints),
        None if request.beam is None else dataclasses.asdict(request.beam),
    ]


def decode_request(packed: _Packed) -> EngineRequest:
    request_id, token_ids, params, priority, cache_salt, is_stepped, tenant, hints, beam = packed
    return EngineRequest(
        request_id,
        token_ids,
        SamplingParams.from_mapping(params),
        priority,
        cache_salt,
        is_stepped,
        tenant,
        hints=KvHints.parse(hints),
        beam=None if beam is None else BeamSearchParams(**beam),
    )


def encode_output(output: SequenceOutput) -> _Packed:
    return [
        output.request_id,
        output.seq_id,
        output.index,
        output.new_token_ids,
        _encode_logprobs(output.logprobs),
        _encode_logprobs(output.prompt_logprobs),
        output.finish_reason.value if output.finish_reason is not None else None,
        output.stop_reason,
        output.num_cached_tokens,
        dataclasses.astuple(output.metrics) if output.metrics is not None else None,
        _encode_sources(output.prompt_sources),
    ]


def decode_output(packed: _Packed) -> SequenceOutput:
    request_id, seq_id, index, new_token_ids, logprobs, prompt_logprobs, *ending = packed
    finish_reason, stop_reason, num_cached_tokens, metrics, sources = ending
    return SequenceOutput(
        request_id,
        seq_id,
        index,
        new_token_ids,
        logprobs=_decode_logprobs(logprobs),
        prompt_logprobs=_decode_logprobs(prompt_logprobs),
        finish_reason=FinishReason(finish_reason) if finish_reason is not None else None,
        stop_reason=stop_reason,
        num_cached_tokens=num_cached_tokens,
        metrics=RequestMetrics(*metrics) if metrics is not None else None,
        prompt_sources=PromptSources(*sources) if sources is not None else None,
    )


def _encode_sources(sources: PromptSources | None) -> list[int] | None:
    return None if sources is None else [sources.gpu, sources.cpu, sources.nvme]


def _encode_logprobs(positions: list[PositionLogprobs] | None) -> list[list[float]] | None:
    if positions is None:
        return None
    return [
        [number for token_id, lp in entry.items() for number in (token_id, lp.logprob, lp.rank)]
        for entry in positions
    ]


def _decode_logprobs(positions: list[list[Any]] | None) -> list[PositionLogprobs] | None:
    if positions is None:
        return None
    return [
        {
            token_id: Logprob(logprob, rank)
            for token_id, logprob, rank in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        }
        for flat in positions
    ]


def encode_error(error: BaseException) -> _Packed:
    """Class name and arguments; what is not an error of tierkv's becomes an EngineDeadError."""
    name = type(error).__name__
    if isinstance(error, RequestError):
        return [name, error.field, _plain(error.value), error.fix]
    if isinstance(error, ConfigError):
        return [name, error.option, _plain(error.value), error.fix]
    if name in _ERRORS:
        return [name, str(error)]
    return [EngineDeadError.__name__, f"{name}: {error}"]


def decode_error(packed: _Packed) -> TierkvError:
    name, *arguments = packed
    return _ERRORS[name](*arguments)


def _plain(value: object) -> object:
    """The value itself where msgpack can carry it, else its (shortened) text."""
    is_small_int = isinstance(value, int) and -(2**63) <= value < 2**63
    if value is None or is_small_int or isinstance(value, (bool, float)):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text[:1000].encode(errors="replace").decode()
