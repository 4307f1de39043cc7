"""Write a trace in the run-length format, which `read_trace` reads back.

One JSON object a line, a line a request, sorted by time; gzip where the name ends in `.gz`:

    timestamp       arrival in milliseconds from the start, whole or with up to three decimals
    session_id      name of the conversation; absent when unknown, as all that follow
    turn            its number within the session, from 1
    input_length    tokens of the prompt, at least 1
    output_length   tokens of the answer, at least 1
    block_size      tokens per block, the same in all lines
    stop            "tool_call" or "end": what the client did with the answer
    tenant          whose request it is
    priority        lower is more urgent
    hash_runs       [[first id, count], ...]: ids of the full blocks of the prompt, root first
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tierkv.errors import ConfigError
from tierkv.sim.trace import Trace, TraceRequest


def as_record(request: TraceRequest, block_size: int) -> dict[str, Any]:
    """A request as a line of the format."""
    milliseconds = round(request.arrival_s * 1000, 3)
    known = {
        "session_id": request.session,
        "turn": request.turn,
        "stop": request.stop_reason,
        "tenant": request.tenant,
        "priority": request.priority,
    }
    return {
        "timestamp": int(milliseconds) if milliseconds.is_integer() else milliseconds,
        "input_length": request.input_tokens,
        "output_length": request.output_tokens,
        "block_size": block_size,
        **{name: value for name, value in known.items() if value},
        "hash_runs": request.runs,
    }


def as_line(request: TraceRequest, block_size: int) -> str:
    """The line, with its end."""
    return json.dumps(as_record(request, block_size), separators=(",", ":")) + "\n"


def write_trace(trace: Trace, path: str | Path) -> int:
    """Write a trace as a whole: the file is there when all of it is. Returns requests.

    Raises:
        ConfigError: the file cannot be written.
    """
    count = 0
    with new_file(Path(path).expanduser()) as file:
        for line in as_lines(trace, trace.block_size):
            file.write(line)
            count += 1
    return count


def as_lines(requests: Iterable[TraceRequest], block_size: int) -> Iterator[str]:
    """A line for each."""
    return (as_line(request, block_size) for request in requests)


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A file that takes its name when it is whole; gzip (the same bytes each time) for `.gz`.

    Raises:
        ConfigError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as raw:
            if path.suffix == ".gz":
                packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
                with packed, io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
                    yield file
            else:
                with io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as file:
                    yield file
        part.replace(path)
    except OSError as error:
        fix = f"cannot be written: {error.strerror or error}"
        raise ConfigError("out", str(path), fix) from None
    finally:
        with suppress(OSError):
            part.unlink()
