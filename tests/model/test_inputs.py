"""Packed steps: block tables that are appended to, positions, slots, wanted rows."""

from __future__ import annotations

import random

import pytest
import torch
from model_steps import make_sequence

from tierkv.engine.plan import PlanRow
from tierkv.kernels.metadata import build_metadata
from tierkv.model.inputs import BlockTables, pack_rows

CPU = torch.device("cpu")


def test_a_row_follows_its_sequence_as_it_grows() -> None:
    tables = BlockTables(num_rows=1, num_blocks=2)
    seq = make_sequence(7, [0] * 9, [5])
    row = tables.update(seq)
    seq.block_table += [3, 9, 4]
    assert tables.update(seq) == row
    assert tables.gather([row], 4).tolist() == [[5, 3, 9, 4]]


def test_changed_entries_are_read_again_only_with_a_new_version() -> None:
    tables = BlockTables()
    seq = make_sequence(1, [0], [5, 6])
    row = tables.update(seq)
    seq.block_table = [0, 6, 8]
    tables.update(seq)
    assert tables.gather([row], 3).tolist() == [[5, 6, 8]]
    seq.table_version += 1
    tables.update(seq)
    assert tables.gather([row], 3).tolist() == [[0, 6, 8]]


def test_rows_are_given_back_and_reused() -> None:
    tables = BlockTables(num_rows=2)
    rows = [tables.update(make_sequence(i, [0], [i])) for i in range(5)]
    assert len(set(rows)) == 5 and len(tables) == 5
    tables.forget(3)
    tables.forget(99)
    assert tables.update(make_sequence(8, [0], [80])) == rows[3]
    order = [rows[4], rows[0], rows[3]]
    assert tables.gather(order, 1).tolist() == [[4], [0], [80]]


def test_a_reused_row_does_not_show_its_former_table() -> None:
    tables = BlockTables(num_rows=1)
    tables.update(make_sequence(1, [0], [1, 2, 3]))
    tables.forget(1)
    row = tables.update(make_sequence(2, [0], [9]))
    assert tables.gather([row], 1).tolist() == [[9]]


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_geometry_is_what_build_metadata_says(block_size: int) -> None:
    generator = random.Random(block_size)
    tables = BlockTables(num_rows=1, num_blocks=1)
    for only_decode in (False, True):
        rows = []
        for seq_id in range(6):
            start = generator.randrange(40)
            count = 1 if only_decode else generator.randrange(1, 20)
            need = -(-(start + count) // block_size)
            blocks = generator.sample(range(200), need + generator.randrange(3))
            seq = make_sequence(seq_id + 10 * only_decode, list(range(100)), blocks)
            rows.append(PlanRow(seq, start, count, 0, 0))
        found = pack_rows(rows, tables, block_size).meta
        want = build_metadata(
            [row.num_tokens for row in rows],
            [row.start + row.num_tokens for row in rows],
            [row.seq.block_table for row in rows],
            block_size,
        )
        for name in ("query_start", "context_lens", "key_start", "key_lens", "positions"):
            assert torch.equal(getattr(found, name), getattr(want, name)), name
        assert torch.equal(found.slot_mapping, want.slot_mapping)
        for seq, length in enumerate(want.context_len_list):
            used = -(-length // block_size)
            assert torch.equal(found.block_tables[seq, :used], want.block_tables[seq, :used])
        for name in ("query_len_list", "context_len_list", "key_start_list", "key_len_list"):
            assert getattr(found, name) == getattr(want, name), name
        assert found.max_block_id >= want.max_block_id


def test_tokens_and_logit_rows_come_in_row_order() -> None:
    first = make_sequence(1, [10, 11, 12, 13, 14], [1, 2])
    second = make_sequence(2, [20, 21], [3])
    third = make_sequence(3, [30, 31, 32], [4])
    rows = [PlanRow(first, 1, 3, 0, 3), PlanRow(second, 1, 1, 1, 1), PlanRow(third, 0, 2, 0, 0)]
    inputs = pack_rows(rows, BlockTables(), 4)
    assert inputs.input_ids.tolist() == [[11, 12, 13, 21, 30, 31]]
    assert inputs.position_ids.tolist() == [[1, 2, 3, 1, 0, 1]]
    assert inputs.logit_rows.tolist() == [0, 1, 2, 3]
    assert inputs.meta.slot_mapping.tolist() == [5, 6, 7, 13, 16, 17]
