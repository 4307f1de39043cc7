"""`tierkv trace record`: from a server's recording to a trace file.

Records come as requests end; they are written by arrival, each once nothing earlier can come. Ids
of blocks are numbered anew, in the order in which they are first seen, so that new blocks of a
prompt are one run: about 100 bytes of memory for each block that is seen.
"""

from __future__ import annotations

import heapq
import http.client
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from tierkv.cli.kv import Server
from tierkv.sim.trace import TraceRequest
from tierkv.sim.trace_fields import runs_of
from tierkv.sim.trace_writer import as_line

ID_DIGITS = 16  # of hexadecimal, as /kv/record writes them
SILENCE_S = 30.0


@dataclass(slots=True)
class Recorded:
    """What a recording has come to.

    Attributes:
        num_written: requests in the file.
        num_dropped: that the server had no room for.
        num_running: not at their end when the recording ended, so not in the file.
        reason: why the server ended it; empty when it did not.
    """

    num_written: int = 0
    num_dropped: int = 0
    num_running: int = 0
    reason: str = ""


class TraceBuilder:
    """Makes lines of a trace from those of a recording.

    Args:
        out: where to write them.
    """

    def __init__(self, out: TextIO) -> None:
        self.found = Recorded()
        self._out = out
        self._block_size = 0
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, TraceRequest]] = []
        self._numbers: dict[int, int] = {}

    def take(self, line: dict[str, Any]) -> None:
        """One line of the recording."""
        kind = line["type"]
        if kind == "start":
            self._block_size = line["block_size"]
        elif kind == "request":
            entry = line["arrival_s"], next(self._order), self._request(line)
            heapq.heappush(self._waiting, entry)
        elif kind == "mark":
            self.found.num_dropped, self.found.num_running = line["dropped"], line["running"]
            self._write(line["until_s"])
        elif kind == "end":
            self.found.reason = line["reason"]

    def finish(self) -> Recorded:
        """Write what is left."""
        self._write(float("inf"))
        return self.found

    def _write(self, until_s: float) -> None:
        while self._waiting and self._waiting[0][0] < until_s:
            _, _, request = heapq.heappop(self._waiting)
            self._out.write(as_line(request, self._block_size))
            self.found.num_written += 1

    def _request(self, line: dict[str, Any]) -> TraceRequest:
        return TraceRequest(
            line["arrival_s"],
            line["input_tokens"],
            line["output_tokens"],
            runs_of(self._number(block) for block in self._blocks(line["blocks"])),
            session=line["session"],
            turn=line["turn"],
            stop_reason=line["stop"],
            tenant=line["tenant"],
            priority=line["priority"],
        )

    def _blocks(self, digits: str) -> Iterator[int]:
        for start in range(0, len(digits), ID_DIGITS):
            yield int(digits[start : start + ID_DIGITS], 16)

    def _number(self, block: int) -> int:
        return self._numbers.setdefault(block, len(self._numbers))


def record(server: Server, out: TextIO, duration_s: float | None) -> Recorded:
    """Record until the time is over, Ctrl-C, SIGTERM, or the server ends it.

    Raises:
        CommandError: the server refuses.
    """
    builder = TraceBuilder(out)
    end = None if duration_s is None else time.monotonic() + duration_s
    try:
        with _interrupted_by_sigterm(), server.open("/kv/record", SILENCE_S) as response:
            for raw in response:
                builder.take(json.loads(raw))
                if end is not None and time.monotonic() >= end:
                    break
    except KeyboardInterrupt:
        pass
    except (OSError, http.client.HTTPException, ValueError) as error:
        builder.found.reason = f"the connection broke: {error}"
    return builder.finish()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does (in the main thread, where signals arrive)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
