"""From planned rows to one packed forward: token ids, positions, block tables, slots.

Block tables live in one tensor that is appended to as sequences grow. A step gathers the rows it
needs, so its cost does not depend on re-reading tables that did not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tierkv.kernels.metadata import AttentionMetadata

if TYPE_CHECKING:
    from tierkv.engine.plan import PlanRow
    from tierkv.engine.request import Sequence as TokenSequence


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One packed forward pass.

    Attributes:
        input_ids, position_ids: int64 `[1, num_tokens]`.
        meta: geometry of the step's attention.
        logit_rows: int64 `[num_logit_rows]`, rows whose logits are wanted.
    """

    input_ids: Tensor
    position_ids: Tensor
    meta: AttentionMetadata
    logit_rows: Tensor

    def to(self, device: torch.device) -> StepInputs:
        """The same step with its tensors on the device; itself where they are there."""
        if device.type == "cpu":
            return self
        return StepInputs(
            input_ids=to_device(self.input_ids, device),
            position_ids=to_device(self.position_ids, device),
            meta=_move(self.meta, device),
            logit_rows=to_device(self.logit_rows, device),
        )


class TokenSource(Protocol):
    """A step's tokens that only the device has."""

    def tokens_of(self, seq_ids: list[int]) -> Tensor:
        """The last token of each sequence, int64 `[len(seq_ids)]` on the device."""
        ...


@dataclass(frozen=True, slots=True)
class LateTokens:
    """Input tokens whose values only the device has.

    Attributes:
        where: their places in the packed batch, ascending.
        values: int64 `[len(where)]` on the device.
    """

    where: list[int]
    values: Tensor

    def put(self, input_ids: Tensor) -> None:
        """Write them where they belong in int64 `[num_tokens]` on the device."""
        if self.where[-1] == len(self.where) - 1:
            input_ids[: len(self.where)].copy_(self.values)
        else:
            where = to_device(torch.tensor(self.where), input_ids.device)
            input_ids.index_copy_(0, where, self.values)


def late_tokens(rows: Iterable[PlanRow], source: TokenSource) -> LateTokens | None:
    """The input tokens that the host does not know, if there are any: one of a row at most, the
    last token of its sequence."""
    where: list[int] = []
    seq_ids: list[int] = []
    end = 0
    for row in rows:
        end += row.num_tokens
        if row.start + row.num_tokens > len(row.seq.token_ids):
            where.append(end - 1)
            seq_ids.append(row.seq.seq_id)
    return LateTokens(where, source.tokens_of(seq_ids)) if where else None


class BlockTables:
    """The block tables of all sequences the runner has seen, as one host tensor.

    Args:
        num_rows, num_blocks: first allocation; both double when they run out.
    """

    def __init__(self, num_rows: int = 16, num_blocks: int = 64) -> None:
        self._table = torch.zeros(num_rows, num_blocks, dtype=torch.int64)
        self._array = self._table.numpy()
        self._rows: dict[int, list[int]] = {}  # seq_id -> [row, table_version, valid entries]
        self._empty = list(range(num_rows - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._rows)

    def update(self, seq: TokenSequence) -> int:
        """Bring the sequence's row up to date and return its index."""
        entry = self._rows.get(seq.seq_id)
        if entry is None:
            entry = self._rows[seq.seq_id] = [self._take_row(), seq.table_version, 0]
        elif entry[1] != seq.table_version:
            entry[1], entry[2] = seq.table_version, 0
        count = len(seq.block_table)
        if count > entry[2]:
            if count > self._table.shape[1]:
                self._grow(self._table.shape[0], max(count, 2 * self._table.shape[1]))
            self._array[entry[0], entry[2] : count] = seq.block_table[entry[2] :]
            entry[2] = count
        return entry[0]

    def gather(self, rows: Sequence[int], num_blocks: int) -> Tensor:
        """`[len(rows), num_blocks]`: the first entries of these rows; past a table's end: any."""
        return self._table[:, :num_blocks].index_select(0, torch.tensor(rows))

    def forget(self, seq_id: int) -> None:
        """Free the sequence's row; unknown ids are ignored."""
        entry = self._rows.pop(seq_id, None)
        if entry is not None:
            self._empty.append(entry[0])

    def _take_row(self) -> int:
        if not self._empty:
            count = self._table.shape[0]
            self._grow(2 * count, self._table.shape[1])
            self._empty.extend(range(2 * count - 1, count - 1, -1))
        return self._empty.pop()

    def _grow(self, num_rows: int, num_blocks: int) -> None:
        table = torch.zeros(num_rows, num_blocks, dtype=torch.int64)
        table[: self._table.shape[0], : self._table.shape[1]] = self._table
        self._table, self._array = table, table.numpy()


def pack_rows(rows: Sequence[PlanRow], tables: BlockTables, block_size: int) -> StepInputs:
    """Pack a plan's rows in order, in CPU memory; `tables` is brought up to date on the way.

    A token that the host does not know is 0; see `late_tokens`.
    """
    query_lens = [row.num_tokens for row in rows]
    starts = [row.start for row in rows]
    context_lens = [row.start + row.num_tokens for row in rows]
    indices = [tables.update(row.seq) for row in rows]
    table = tables.gather(indices, -(-max(context_lens) // block_size))
    meta = _metadata(query_lens, starts, context_lens, table, block_size)
    return StepInputs(
        input_ids=torch.tensor(_token_ids(rows)).unsqueeze(0),
        position_ids=meta.positions.unsqueeze(0),
        meta=meta,
        logit_rows=torch.tensor(list(_logit_rows(rows)), dtype=torch.int64),
    )


def _token_ids(rows: Iterable[PlanRow]) -> list[int]:
    tokens: list[int] = []
    for row in rows:
        ids = row.seq.token_ids
        if row.num_tokens == 1:
            tokens.append(ids[row.start] if row.start < len(ids) else 0)
        else:
            tokens.extend(ids[row.start : row.start + row.num_tokens])
    return tokens


def _logit_rows(rows: Iterable[PlanRow]) -> Iterable[int]:
    """Positions in the packed batch of the last `num_logit_rows` tokens of every row."""
    end = 0
    for row in rows:
        end += row.num_tokens
        yield from range(end - row.num_logit_rows, end)


def _metadata(
    query_lens: list[int],
    starts: list[int],
    context_lens: list[int],
    table: Tensor,
    block_size: int,
) -> AttentionMetadata:
    """Geometry of a step over whole contexts; see `kernels.metadata.build_metadata`."""
    lens, first = torch.tensor(query_lens), torch.tensor(starts)
    num_seqs, num_tokens = len(query_lens), sum(query_lens)
    query_start = torch.zeros(num_seqs + 1, dtype=torch.int64)
    torch.cumsum(lens, 0, out=query_start[1:])
    seq = torch.arange(num_seqs)
    positions = first
    if num_tokens != num_seqs:
        seq = seq.repeat_interleave(lens, output_size=num_tokens)
        positions = torch.arange(num_tokens) + (first - query_start[:-1])[seq]
    block = positions.div(block_size, rounding_mode="floor")
    slots = table[seq, block] * block_size + (positions - block * block_size)
    context = first + lens
    return AttentionMetadata(
        query_start=query_start,
        context_lens=context,
        key_start=torch.zeros(num_seqs, dtype=torch.int64),
        key_lens=context,
        block_tables=table,
        positions=positions,
        slot_mapping=slots,
        block_size=block_size,
        query_len_list=query_lens,
        context_len_list=context_lens,
        key_start_list=[0] * num_seqs,
        key_len_list=context_lens,
        max_block_id=int(table.max()),
    )


def _move(meta: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    """The same geometry with its tensors on the device; one that is there twice goes once."""
    tensors = {
        f.name: value for f in fields(meta) if isinstance(value := getattr(meta, f.name), Tensor)
    }
    moved = {id(tensor): to_device(tensor, device) for tensor in tensors.values()}
    names: dict[str, Any] = {name: moved[id(tensor)] for name, tensor in tensors.items()}
    return replace(meta, **names, plans={})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Asynchronous copy to an accelerator; nothing to do on the CPU."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
