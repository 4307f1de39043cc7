"""Copying rows of bytes between tables."""

from __future__ import annotations

import pytest
import torch

from tierkv.kernels import ops, reference


def table(num_rows: int, num_bytes: int, gap: int) -> torch.Tensor:
    """Random bytes, rows `gap` bytes apart."""
    whole = torch.randint(0, 256, (num_rows, num_bytes + gap), dtype=torch.uint8)
    return whole[:, :num_bytes]


@pytest.mark.parametrize("num_bytes", [1, 100, 4096, 4097, 9001])
@pytest.mark.parametrize(("src_gap", "dst_gap"), [(0, 0), (0, 24), (24, 0), (24, 24), (1, 63)])
def test_copy_rows(num_bytes, src_gap, dst_gap, backend, rng) -> None:
    source, destination = table(40, num_bytes, src_gap), table(60, num_bytes, dst_gap)
    # Scattered rows, a run on both sides, a run on one side only, the last rows.
    dst_ids = torch.cat([torch.randperm(30), torch.arange(30, 60)])
    src_ids = torch.cat([torch.randint(0, 40, (30,)), torch.arange(10), torch.randperm(20) + 20])
    order = torch.arange(60).roll(rng.randrange(60))
    before = source.clone()
    wanted = torch.empty_strided((60, num_bytes), destination.stride(), dtype=torch.uint8)
    wanted.copy_(destination)
    ops.copy_rows(source, src_ids[order], destination, dst_ids[order])
    reference.copy_rows(source, src_ids[order], wanted, dst_ids[order])
    assert torch.equal(destination, wanted)
    assert torch.equal(source, before)


def test_other_rows_and_gaps_stay(backend) -> None:
    whole = torch.zeros(8, 32, dtype=torch.uint8)
    source = torch.full((4, 20), 7, dtype=torch.uint8)
    ops.copy_rows(source, torch.tensor([0, 1, 3]), whole[:, :20], torch.tensor([2, 3, 7]))
    assert torch.equal(whole[:, :20].any(1), torch.tensor([0, 0, 1, 1, 0, 0, 0, 1]).bool())
    assert not whole[:, 20:].any()


def test_ids_may_be_strided_and_none(backend) -> None:
    source, destination = table(6, 10, 0), table(6, 10, 0)
    wanted = destination.clone()
    ids = torch.arange(6)
    ops.copy_rows(source, ids[:0], destination, ids[:0])
    assert torch.equal(destination, wanted)
    ops.copy_rows(source, ids[::2], destination, ids[1::2])
    assert torch.equal(destination[1::2], source[::2])


@pytest.mark.parametrize(("src", "dst"), [(4, 0), (-1, 0), (0, 5), (0, -1)])
def test_ids_outside_are_refused(src: int, dst: int, backend) -> None:
    source, destination = torch.ones(4, 8).byte(), torch.zeros(5, 8).byte()
    with pytest.raises(IndexError):
        ops.copy_rows(source, torch.tensor([1, src]), destination, torch.tensor([1, dst]))


BYTES, IDS = torch.zeros(4, 8, dtype=torch.uint8), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"source": BYTES.float()}, TypeError, "source has dtype"),
        ({"source": BYTES[0]}, ValueError, "source must have rows"),
        ({"destination": BYTES.T}, ValueError, "destination must have rows"),
        ({"destination": BYTES[:1].expand(4, 8)}, ValueError, "destination must have rows"),
        ({"destination": BYTES[:, :7]}, ValueError, "destination has rows of 7 bytes"),
        ({"destination": BYTES.to("meta")}, ValueError, "destination is on meta"),
        ({"src_ids": IDS.int()}, TypeError, "src_ids has dtype"),
        ({"dst_ids": IDS[:1]}, ValueError, "dst_ids has shape"),
    ],
)
def test_what_is_wrong_is_named(changes, error, message) -> None:
    arguments = {"source": BYTES, "src_ids": IDS, "destination": BYTES.clone(), "dst_ids": IDS}
    with pytest.raises(error, match=message):
        ops.copy_rows(**{**arguments, **changes})
