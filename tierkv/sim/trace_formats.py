"""Formats of traces: from a record (a JSON object, or a row of CSV) to lengths and block ids.

    runs       hash_runs: [[first id, count], ...] of the full blocks; what this project writes
    mooncake   hash_ids: one per block of 512 tokens, a last partial block included; milliseconds
    vllm       the same with blocks of 16 tokens and seconds (`vllm bench serve --dataset-name
               timed_trace`, whose defaults these are)
    lengths    no ids: JSON lines or CSV such as Azure's (TIMESTAMP, ContextTokens,
               GeneratedTokens) and BurstGPT's
    text       input (text or messages) and output: no lengths, no ids

Fields that a format does not know are ignored. A block's id stands for the whole prefix that ends
with it. Where a trace has no ids they are made:

* lengths: no two prompts have a block in common, unless `shared_prefix_tokens` says that each
  begins with one of `num_shared_prefixes` system prompts of that length, the n-th most popular
  with weight 1/n, drawn with `seed`. What is not known of a trace must not look like a hit.
* text: a token is taken to be `bytes_per_token` bytes of UTF-8, and a block's id is a hash of all
  the text up to its end. Where real tokens end is not known, so lengths are approximate; equal
  prefixes stay equal.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

from tierkv.config import check_choices, option
from tierkv.errors import ConfigError
from tierkv.sim import trace_fields as fields
from tierkv.sim.trace import Run
from tierkv.sim.trace_fields import Record
from tierkv.sim.trace_lines import BadLine

Prompt = tuple[int, int, tuple[Run, ...]]
"""Input tokens, output tokens, ids of the full blocks."""

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
"""Units of time, by how many make a second."""
_TEXTS = ("input", "messages", "prompt")
_OUTPUTS = ("output", "response", "completion")


@dataclass(slots=True, frozen=True, kw_only=True)
class ReadOptions:
    """How a trace is read; None and `auto` leave it to the format.

    Raises:
        ConfigError: a value is out of range.
    """

    format: str = option(
        "auto",
        "format of the trace",
        choices=("auto", "runs", "mooncake", "vllm", "lengths", "text"),
    )
    block_size: int | None = option(None, "tokens per block, where the trace does not say")
    time_unit: str | None = option(None, "unit of numeric timestamps", choices=tuple(UNITS))
    chain_ids: bool = option(False, "hash_ids stand for contents of blocks, not for prefixes")
    shared_prefix_tokens: int = option(0, "of traces without ids: length of the system prompts")
    num_shared_prefixes: int = option(8, "of traces without ids: how many system prompts there are")
    seed: int = option(0, "of traces without ids: which request has which system prompt")
    bytes_per_token: int = option(4, "of traces of text: UTF-8 bytes that count as a token")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("block_size", "num_shared_prefixes", "bytes_per_token"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")
        if self.shared_prefix_tokens < 0:
            raise ConfigError("shared_prefix_tokens", self.shared_prefix_tokens, "must not be < 0")


class Format:
    """Reads the records of one trace, in order.

    Args:
        options: how.
        first: the first record that can be parsed.

    Attributes:
        name: as in `ReadOptions.format`.
        block_size: tokens per block, the same for all records.
        default_block_size, default_unit: where neither options nor records say.
        starts_at_zero: the first request's arrival is time 0.
    """

    name: ClassVar[str]
    default_block_size: ClassVar[int] = 16
    default_unit: ClassVar[str] = "ms"
    starts_at_zero: ClassVar[bool] = True

    def __init__(self, options: ReadOptions, first: Record) -> None:
        self.options = options
        self.per_second = UNITS[options.time_unit or self.default_unit]
        self.block_size = options.block_size or block_size_of(first) or self.default_block_size

    def prompt(self, record: Record) -> Prompt:
        """Lengths and ids.

        Raises:
            BadLine: they cannot be told.
        """
        self._check_block_size(record)
        num_input = fields.length(record, fields.INPUT)
        num_output = fields.length(record, fields.OUTPUT)
        return num_input, num_output, self.runs(record, num_input)

    def runs(self, record: Record, num_input: int) -> tuple[Run, ...]:
        """Ids of the full blocks."""
        raise NotImplementedError

    def _check_block_size(self, record: Record) -> None:
        found = record.get("block_size")
        if found is not None and found != self.block_size:
            raise BadLine("block_size", found, f"must be {self.block_size} as in the first line")


def block_size_of(record: Record) -> int | None:
    """What the record says, if that can be true."""
    found = record.get("block_size")
    return found if type(found) is int and found >= 1 else None


class RunsFormat(Format):
    name = "runs"
    starts_at_zero = False

    def runs(self, record: Record, num_input: int) -> tuple[Run, ...]:
        _, value = fields.present(record, ("hash_runs",))
        return fields.parse_runs(value, num_input // self.block_size)


class IdsFormat(Format):
    name = "mooncake"
    default_block_size = 512

    def runs(self, record: Record, num_input: int) -> tuple[Run, ...]:
        _, value = fields.present(record, ("hash_ids",))
        if not isinstance(value, list):
            raise BadLine("hash_ids", value, "must be a list of ids, one for each block")
        full = num_input // self.block_size
        if len(value) not in (full, -(-num_input // self.block_size)):
            raise BadLine("hash_ids", f"<{len(value)} ids>", self._count_fix(full, num_input))
        ids = [fields.block_id("hash_ids", each) for each in value[:full]]
        if self.options.chain_ids:
            ids = fields.chained(ids)
        elif len(set(ids)) < len(ids):
            fix = "an id occurs twice, so it names no prefix: --chain-ids makes it one"
            raise BadLine("hash_ids", f"<{len(value)} ids>", fix)
        return fields.runs_of(ids)

    def _count_fix(self, full: int, num_input: int) -> str:
        return (
            f"{num_input} tokens are {full} blocks of {self.block_size} and a rest:"
            " give block_size if it is another"
        )


class VllmFormat(IdsFormat):
    name = "vllm"
    default_block_size = 16
    default_unit = "s"


class LengthsFormat(Format):
    name = "lengths"

    def __init__(self, options: ReadOptions, first: Record) -> None:
        super().__init__(options, first)
        self._next_id = options.num_shared_prefixes * self._num_shared
        self._random = random.Random(options.seed)
        ranks = range(1, options.num_shared_prefixes + 1)
        self._weights = list(itertools.accumulate(1 / rank for rank in ranks))

    @property
    def _num_shared(self) -> int:
        return self.options.shared_prefix_tokens // self.block_size

    def runs(self, record: Record, num_input: int) -> tuple[Run, ...]:
        full = num_input // self.block_size
        num_shared = min(self._num_shared, full)
        runs = [(self._system_prompt(), num_shared)] if num_shared else []
        if full > num_shared:
            runs.append((self._next_id, full - num_shared))
            self._next_id += full - num_shared
        return tuple(runs)

    def _system_prompt(self) -> int:
        """The first id of one of the shared prefixes."""
        prefixes = range(self.options.num_shared_prefixes)
        (which,) = self._random.choices(prefixes, cum_weights=self._weights)
        return which * self._num_shared


class CsvFormat(LengthsFormat):
    default_unit = "s"


class TextFormat(Format):
    name = "text"

    def prompt(self, record: Record) -> Prompt:
        name, value = fields.present(record, _TEXTS)
        text = text_bytes(name, value)
        name, value = fields.present(record, _OUTPUTS)
        output = text_bytes(name, value)
        if not text or not output:
            raise BadLine(name if text else _TEXTS[0], "", "must not be empty")
        num_input, num_output = self._tokens(text), self._tokens(output)
        return num_input, num_output, fields.runs_of(self._ids(text))

    def _tokens(self, text: bytes) -> int:
        return -(-len(text) // self.options.bytes_per_token)

    def _ids(self, text: bytes) -> Iterator[int]:
        """A hash of all bytes up to the end of each full block."""
        size, so_far = self.block_size * self.options.bytes_per_token, blake2b(digest_size=8)
        for start in range(0, len(text) - size + 1, size):
            so_far.update(text[start : start + size])
            yield int.from_bytes(so_far.digest(), "big") >> 1


def text_bytes(name: str, value: object) -> bytes:
    """A text, or messages one after another, each with its role before it."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if not isinstance(value, list):
        raise BadLine(name, value, "must be text or a list of messages")
    return b"".join(_message_bytes(name, each) for each in value)


def _message_bytes(name: str, message: object) -> bytes:
    if not isinstance(message, dict):
        raise BadLine(name, message, "messages must be objects")
    content: Any = message.get("content")
    rest = {key: each for key, each in message.items() if key not in ("role", "content")}
    parts = [content if isinstance(content, str) else _as_json(content)]
    parts += [_as_json(rest)] if rest else []
    return f"<|{message.get('role', '')}|>\n{''.join(parts)}\n".encode("utf-8", "surrogatepass")


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


FORMATS: dict[str, type[Format]] = {
    kind.name: kind for kind in (RunsFormat, IdsFormat, VllmFormat, LengthsFormat, TextFormat)
}


def detected(record: Record, block_size: int | None) -> type[Format] | None:
    """The format that a record of JSON has, if it has one that is known."""
    if "hash_runs" in record:
        return RunsFormat
    if "hash_ids" in record:
        return VllmFormat if _has_vllm_blocks(record, block_size) else IdsFormat
    if fields.named(record, fields.INPUT)[1] is not None:
        return LengthsFormat
    return TextFormat if fields.named(record, _TEXTS)[1] is not None else None


def _has_vllm_blocks(record: Record, block_size: int | None) -> bool:
    """Whether nobody says how long blocks are, and the ids are just enough for 16 tokens each."""
    ids, num_input = record["hash_ids"], fields.named(record, fields.INPUT)[1]
    if (
        block_size is not None
        or "block_size" in record
        or type(num_input) is not int
        or not isinstance(ids, list)
    ):
        return False
    size = VllmFormat.default_block_size
    return len(ids) > 1 and len(ids) in (num_input // size, -(-num_input // size))
