"""Read a trace: `read_trace(path)`, whatever format the file has.

Readers hold one line at a time and a bounded memory of what came before. A line that cannot be
used is skipped and told of; too many of them, or nothing else, is an error.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError
from tierkv.sim import trace_fields as fields
from tierkv.sim.trace import Run, Trace, TraceRequest
from tierkv.sim.trace_fields import Record
from tierkv.sim.trace_formats import FORMATS, CsvFormat, Format, ReadOptions, detected
from tierkv.sim.trace_lines import BadLine, Problem, check_file, numbered_lines

logger = logging.getLogger(__name__)

MOST_PROBLEMS = 100
"""Bad lines that a trace may have."""

OnProblem = Callable[[Problem], None]
Parse = Callable[[bytes], Record]
_MOST_PARENTS = 1 << 16
_LOOK_LINES = 100  # among which one must be good enough to tell the format


def warn(problem: Problem) -> None:
    """Write it into the log."""
    logger.warning("skipped %s", problem)


@dataclass(slots=True, frozen=True)
class _Source:
    """A file whose format is known."""

    path: Path
    options: ReadOptions
    kind: type[Format]
    first: Record
    parse: Parse
    header_line: int

    def format(self) -> Format:
        return self.kind(self.options, self.first)


def read_trace(
    path: str | Path,
    *,
    limit: int | None = None,
    options: ReadOptions | None = None,
    on_problem: OnProblem = warn,
    most_problems: int = MOST_PROBLEMS,
) -> Trace:
    """A trace from a file.

    Args:
        path: JSON lines or CSV, plain or gzip.
        limit: requests to read; None for all.
        options: how; None leaves all to the file.
        on_problem: called for each bad line, each time the trace is read.
        most_problems: bad lines from which on the file is refused.

    Raises:
        ConfigError: the file cannot be read or has no known format; while it is read: too many
            of its lines are bad, or all.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", limit, "must be at least 1")
    file = Path(path).expanduser()
    check_file(file)
    source = _look(file, options or ReadOptions())
    name = file.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".csv")

    def begin() -> Iterator[TraceRequest]:
        return _requests(source, limit, on_problem, most_problems)

    return Trace(name, source.format().block_size, begin)


# ---------------------------------------------------------------------- what format it is


def _look(path: Path, options: ReadOptions) -> _Source:
    """The format, from the first lines that can be parsed."""
    columns: list[str] | None = None
    problem: BadLine | None = None
    for count, (number, line) in enumerate(numbered_lines(path)):
        if count == 0 and not line.lstrip(b"\xef\xbb\xbf \t").startswith((b"{", b"[")):
            columns = _columns(line)
        if columns is not None:
            return _Source(path, options, CsvFormat, {}, _row_parser(columns), number)
        try:
            record = parse_json(line)
            kind = _kind(record, options)
        except BadLine as error:
            problem = problem or error
            if count < _LOOK_LINES:
                continue
            break
        return _Source(path, options, kind, record, parse_json, 0)
    raise ConfigError("trace", str(path), f"no line has a known format; the first: {problem}")


def _kind(record: Record, options: ReadOptions) -> type[Format]:
    if options.format != "auto":
        return FORMATS[options.format]
    kind = detected(record, options.block_size)
    if kind is None:
        fix = "needs hash_runs, hash_ids, input_length or input: see docs/traces.md"
        raise BadLine("", sorted(record), fix)
    return kind


def _columns(line: bytes) -> list[str] | None:
    """The names of the columns, in lower case, if the line is a header of CSV."""
    try:
        row = next(csv.reader([line.decode("utf-8-sig")]), [])
    except (UnicodeDecodeError, csv.Error):
        return None
    columns = [name.strip().lower() for name in row]
    needed = (fields.TIME, fields.INPUT, fields.OUTPUT)
    return columns if all(any(n in columns for n in names) for names in needed) else None


# ---------------------------------------------------------------------- lines to records


def parse_json(line: bytes) -> Record:
    """The object of a line."""
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        raise BadLine("", line[:40], "must be UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadLine("", line[:40], f"must be a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise BadLine("", record, "must be a JSON object")
    return record


def _row_parser(columns: list[str]) -> Parse:
    numeric = {*fields.TIME, *fields.INPUT, *fields.OUTPUT}

    def parse(line: bytes) -> Record:
        try:
            row = next(csv.reader([line.decode("utf-8")]), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadLine("", line[:40], f"must be a row of CSV: {error}") from None
        if len(row) != len(columns):
            raise BadLine("", f"<{len(row)} values>", f"the header names {len(columns)} columns")
        cells = zip(columns, row, strict=True)
        return {name: _number(cell) if name in numeric else cell for name, cell in cells if cell}

    return parse


def _number(cell: str) -> int | float | str:
    """A cell as a number, if it is one."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


# ---------------------------------------------------------------------- records to requests


def _requests(
    source: _Source, limit: int | None, on_problem: OnProblem, most_problems: int
) -> Iterator[TraceRequest]:
    reader = _Reader(source.format())
    num_bad = num_good = 0
    for number, line in numbered_lines(source.path):
        if number == source.header_line:
            continue
        try:
            request = reader.request(source.parse(line))
        except BadLine as bad:
            num_bad += 1
            on_problem(Problem(str(source.path), number, bad.field, bad.found, bad.fix))
            if num_bad > most_problems:
                fix = f"over {most_problems} bad lines; the last: line {number}, {bad}"
                raise ConfigError("trace", str(source.path), fix) from None
            continue
        num_good += 1
        yield request
        if num_good == limit:
            return
    if not num_good:
        fix = f"has no usable request; {num_bad} lines are bad"
        raise ConfigError("trace", str(source.path), fix)


class _Reader:
    """From records to requests, with what must hold from one to the next."""

    def __init__(self, format: Format) -> None:
        self._format = format
        self._origin_s: float | None = None if format.starts_at_zero else 0.0
        self._last_s = 0.0
        self._parents = _Parents()

    def request(self, record: Record) -> TraceRequest:
        arrival_s = fields.seconds(record, self._format.per_second)
        if self._origin_s is not None and arrival_s < self._last_s:
            fix = f"the line before came at {self._last_s:.6f} s: sort the trace by time"
            raise BadLine(fields.named(record, fields.TIME)[0], arrival_s, fix)
        num_input, num_output, runs = self._format.prompt(record)
        request = TraceRequest(
            0.0,
            num_input,
            num_output,
            runs,
            session=fields.text_of(record, fields.SESSION),
            turn=fields.optional_whole(record, "turn", least=0),
            stop_reason=fields.stop_reason(record),
            tenant=fields.text_of(record, ("tenant",)),
            priority=fields.optional_whole(record, "priority", least=-fields.MOST_ID),
        )
        self._parents.check(runs)
        if self._origin_s is None:
            self._origin_s = arrival_s
        self._last_s = arrival_s
        request.arrival_s = round(arrival_s - self._origin_s, 6)
        return request


class _Parents:
    """Whether ids name prefixes: the block before an id is always the same.

    The first ids of runs are looked at, and so many of them are remembered that memory is bounded:
    what contradicts an id of long ago is not seen.
    """

    def __init__(self) -> None:
        self._parents: OrderedDict[int, int | None] = OrderedDict()

    def check(self, runs: tuple[Run, ...]) -> None:
        """Raise BadLine if an id has another parent than before."""
        parent: int | None = None
        pairs = []
        for first, count in runs:
            if self._parents.get(first, parent) != parent:
                found = "the first block" if parent is None else f"block {parent}"
                fix = "an id stands for one prefix: --chain-ids, if ids are of contents only"
                raise BadLine("hash_ids", f"{first} after {found}", fix)
            pairs.append((first, parent))
            parent = first + count - 1
        for first, parent in pairs:
            self._note(first, parent)

    def _note(self, first: int, parent: int | None) -> None:
        self._parents[first] = parent
        self._parents.move_to_end(first)
        if len(self._parents) > _MOST_PARENTS:
            self._parents.popitem(last=False)
