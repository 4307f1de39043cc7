"""Fields of a trace's records: each is found under the names that traces use, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

from tierkv.sim.trace import Run
from tierkv.sim.trace_lines import BadLine

Record = Mapping[str, Any]

MOST_TOKENS = 1 << 27
_MOST_TIME = 1e19  # nanoseconds since 1970 are below
MOST_ID = (1 << 63) - 1
TIME = ("timestamp", "arrival_time", "arrival", "arrived_at", "time")
INPUT = ("input_length", "input_tokens", "contexttokens", "request tokens", "prompt_tokens")
OUTPUT = (
    *("output_length", "output_tokens", "generatedtokens", "response tokens"),
    "completion_tokens",
)
SESSION = ("session_id", "session", "conversation_id", "chat_id", "session id")
STOP = ("stop", "stop_reason", "finish_reason")
STOP_REASONS = {
    **dict.fromkeys(("tool_use", "tool_call", "tool_calls"), "tool_call"),
    **dict.fromkeys(("end_turn", "end", "stop"), "end"),
}


def named(record: Record, names: Iterable[str]) -> tuple[str, Any]:
    """The field's name and value in this record; the first name and None where it is absent."""
    first = ""
    for name in names:
        first = first or name
        if record.get(name) is not None:
            return name, record[name]
    return first, None


def present(record: Record, names: Iterable[str]) -> tuple[str, Any]:
    """As `named`, of a field that every record has."""
    name, value = named(record, names)
    if value is None:
        raise BadLine(name, None, f"every request needs {name}")
    return name, value


def length(record: Record, names: Iterable[str]) -> int:
    """A number of tokens."""
    name, value = present(record, names)
    return whole(name, value, least=1, most=MOST_TOKENS)


def whole(name: str, value: object, *, least: int, most: int) -> int:
    """A whole number in a range."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise BadLine(name, value, f"must be a whole number from {least} to {most}")
    return value


def optional_whole(record: Record, name: str, *, least: int) -> int:
    """A whole number; 0 where it is absent."""
    value = record.get(name)
    return 0 if value is None else whole(name, value, least=least, most=MOST_ID)


def seconds(record: Record, per_second: float) -> float:
    """The time of arrival; numbers count units of which `per_second` are a second,
    texts are dates of ISO 8601."""
    name, value = present(record, TIME)
    if isinstance(value, str):
        return _of_date(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadLine(name, value, "must be a number or a date of ISO 8601")
    if not 0 <= value <= _MOST_TIME:
        raise BadLine(name, value, f"must be a number from 0 to {_MOST_TIME:g}")
    return value / per_second


def _of_date(name: str, text: str) -> float:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise BadLine(name, text, "must be a number or a date of ISO 8601") from None
    return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()


def text_of(record: Record, names: Iterable[str]) -> str:
    """A name: text, or a number; empty where it is absent."""
    name, value = named(record, names)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadLine(name, value, "must be text or a whole number")
    return str(value)


def stop_reason(record: Record) -> str:
    """What the client did with the answer; empty for words that are not known."""
    _, value = named(record, STOP)
    return STOP_REASONS.get(value, "") if isinstance(value, str) else ""


def block_id(name: str, value: object) -> int:
    """An id of 63 bits: numbers are their own, texts and other numbers are hashed."""
    if type(value) is int and 0 <= value <= MOST_ID:
        return value
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadLine(name, value, "ids must be whole numbers or texts")
    return hash63(str(value).encode("utf-8", "surrogatepass"))


def hash63(data: bytes) -> int:
    """A number of 63 bits that stands for these bytes."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 1


def chained(ids: Iterable[int]) -> list[int]:
    """Ids that stand for whole prefixes, from ids that stand for the contents of blocks."""
    found, parent = [], b""
    for block in ids:
        key = blake2b(parent + block.to_bytes(8, "big"), digest_size=8).digest()
        found.append(int.from_bytes(key, "big") >> 1)
        parent = key
    return found


def runs_of(ids: Iterable[int]) -> tuple[Run, ...]:
    """Ids in run-length form."""
    runs: list[Run] = []
    first, count = 0, 0
    for block in ids:
        if count and block == first + count:
            count += 1
            continue
        if count:
            runs.append((first, count))
        first, count = block, 1
    return (*runs, (first, count)) if count else ()


def parse_runs(value: object, most_blocks: int) -> tuple[Run, ...]:
    """Runs as a record has them: `[[first, count], ...]`, of at most so many blocks."""
    if not isinstance(value, list):
        raise BadLine("hash_runs", value, "must be a list of [first id, count]")
    runs, total = [], 0
    for run in value:
        if not isinstance(run, list) or len(run) != 2:
            raise BadLine("hash_runs", run, "must be a list of [first id, count]")
        first = whole("hash_runs", run[0], least=0, most=MOST_ID)
        count = whole("hash_runs", run[1], least=1, most=MOST_TOKENS)
        if first + count - 1 > MOST_ID:
            raise BadLine("hash_runs", run, "ids must be below 2**63")
        total += count
        runs.append((first, count))
    if total > most_blocks:
        fix = f"the prompt has {most_blocks} full blocks: check input_length and block_size"
        raise BadLine("hash_runs", f"<{total} ids>", fix)
    return tuple(runs)
