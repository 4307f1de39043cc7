"""A plan as one array of integers, for ranks that have no scheduler.

    num_forgotten, num_copies, num_rows
    sequence id                                         of each forgotten sequence
    source, destination, num_tokens                     of each copy
    sequence id, start, num_tokens, num_samples, num_logit_rows, table version, first, num_new,
        num_tokens token ids, num_new block ids         of each row

int64. Of a block table only what the other side has not seen is sent: the entries from `first` on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np

from tierkv.engine.plan import Plan, PlanRow
from tierkv.types import BlockCopy

if TYPE_CHECKING:
    from tierkv.engine.request import Sequence


class StepEncoder:
    """Plans to bytes; remembers what each sequence's table was when it was sent last."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, int]] = {}  # sequence id -> table version, entries
        self._forgotten: list[int] = []

    def forget(self, seq_id: int) -> None:
        """The sequence is over; the next step says so."""
        if self._sent.pop(seq_id, None) is not None:
            self._forgotten.append(seq_id)

    def encode(self, plan: Plan) -> bytes:
        """The plan's copies and rows."""
        numbers = [len(self._forgotten), len(plan.copies), len(plan.rows), *self._forgotten]
        self._forgotten = []
        for copy in plan.copies:
            numbers += (copy.source, copy.destination, copy.num_tokens)
        for row in plan.rows:
            numbers += self._row(row)
        return np.array(numbers, dtype=np.int64).tobytes()

    def _row(self, row: PlanRow) -> list[int]:
        seq, end = row.seq, row.start + row.num_tokens
        version, first = self._sent.get(seq.seq_id, (seq.table_version, 0))
        if version != seq.table_version:
            first = 0
        new = seq.block_table[first:]
        self._sent[seq.seq_id] = seq.table_version, first + len(new)
        numbers = [seq.seq_id, row.start, row.num_tokens, row.num_samples, row.num_logit_rows]
        numbers += (seq.table_version, first, len(new))
        return [*numbers, *seq.token_ids[row.start : end], *new]


class TokenWindow:
    """The tokens of one step, at the positions that they have in their sequence."""

    __slots__ = ("_start", "_tokens")

    def __init__(self, start: int, tokens: list[int]) -> None:
        self._start, self._tokens = start, tokens

    def __len__(self) -> int:
        """Tokens of the sequence as far as they are known."""
        return self._start + len(self._tokens)

    def __getitem__(self, where: int | slice) -> int | list[int]:
        if isinstance(where, int):
            return self._tokens[where - self._start]
        return self._tokens[where.start - self._start : where.stop - self._start]


@dataclass(slots=True)
class MirroredSequence:
    """What a rank without a scheduler knows of a sequence: as much as a `ModelRunner` reads."""

    seq_id: int
    table_version: int
    block_table: list[int] = field(default_factory=list)
    token_ids: TokenWindow = field(default_factory=lambda: TokenWindow(0, []))
    epoch: int = 0


class StepDecoder:
    """Bytes to plans; the other end of a `StepEncoder`, whose steps it sees all and in order."""

    def __init__(self) -> None:
        self._sequences: dict[int, MirroredSequence] = {}

    def decode(self, payload: bytes) -> tuple[Plan, list[int]]:
        """The plan, and the sequences that are over."""
        numbers = iter(np.frombuffer(payload, dtype=np.int64).tolist())
        num_forgotten, num_copies, num_rows = islice(numbers, 3)
        forgotten = list(islice(numbers, num_forgotten))
        for seq_id in forgotten:
            del self._sequences[seq_id]
        copies = [BlockCopy(*islice(numbers, 3)) for _ in range(num_copies)]
        rows = [self._row(numbers) for _ in range(num_rows)]
        return Plan(rows, copies, num_tokens=sum(row.num_tokens for row in rows)), forgotten

    def _row(self, numbers: Iterator[int]) -> PlanRow:
        seq_id, start, num_tokens, *wanted, version, first, num_new = islice(numbers, 8)
        seq = self._sequences.setdefault(seq_id, MirroredSequence(seq_id, version))
        seq.table_version = version
        seq.token_ids = TokenWindow(start, list(islice(numbers, num_tokens)))
        seq.block_table[first:] = islice(numbers, num_new)
        return PlanRow(cast("Sequence", seq), start, num_tokens, *wanted)
