"""Nuclei wider than the candidates that were looked at: the smallest logit that top-p keeps.

    S(t) = sum of exp(l - best) over the logits l > t;   floor = the smallest t with S(t) < mass

S falls in steps, at logits, so the floor is one of them. It is looked for among the fp32 numbers,
which have the order of the integers that `image_of` makes of their bits: a pass over the row sums
above three numbers, which quarter what is left, and after 16 passes at most none is left between
two neighbours. (FlashInfer's `TopPRenormProbKernel` cuts the range of probabilities in three.)

A program owns a row, so a row that is not open costs nothing but its place in the launch. All sums
add in one order, and rounding is monotonic: S falls in fp32 too, and a row has the same floor in
any batch. It may differ from another implementation's where S comes within rounding of mass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.triton.tiles import power_of_two

_TILE = 4096  # logits of one turn: 8 per thread, 32 bytes
_NUM_WARPS = 16
_NEVER = tl.constexpr(-2139095041)  # image of -inf


@triton.jit
def image_of(number):
    """The integer that has the place of an fp32 number among them all; its own inverse on bits."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def number_of(image):
    """The fp32 number with this image, an int64."""
    bits = image.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def masses_above(row, vocab, top, first, second, third, TILE: tl.constexpr):
    """The mass of the logits above each of three numbers."""
    above_first = tl.full([TILE], 0.0, tl.float32)
    above_second = tl.full([TILE], 0.0, tl.float32)
    above_third = tl.full([TILE], 0.0, tl.float32)
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        value = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        weight = tl.exp(value - top)
        above_first += tl.where(value > first, weight, 0.0)
        above_second += tl.where(value > second, weight, 0.0)
        above_third += tl.where(value > third, weight, 0.0)
    return tl.sum(above_first), tl.sum(above_second), tl.sum(above_third)


@triton.jit
def widen(logits, row_stride, best, mass, is_open, floor, vocab, TILE: tl.constexpr):
    """Lower the floor of a row that is open; grid (rows,).

    logits fp32 `[rows, vocab]`; best, mass and floor fp32 `[rows]`; is_open uint8 `[rows]`.
    """
    at = tl.program_id(0).to(tl.int64)
    if tl.load(is_open + at) != 0:
        row = logits + at * row_stride
        top, wanted = tl.load(best + at), tl.load(mass + at)
        high = image_of(tl.load(floor + at)).to(tl.int64)  # S(high) < mass
        low = tl.full([], _NEVER, tl.int64)  # not kept
        while high - low > 1:
            width = high - low
            first = low + tl.maximum(width >> 2, 1)
            second = low + (width >> 1)
            third = low + (width * 3 >> 2)
            above_first, above_second, above_third = masses_above(
                row, vocab, top, number_of(first), number_of(second), number_of(third), TILE
            )
            if above_second < wanted:
                high = tl.where(above_first < wanted, first, second)
                low = tl.where(above_first < wanted, low, first)
            else:
                high = tl.where(above_third < wanted, third, high)
                low = tl.where(above_third < wanted, second, third)
        tl.store(floor + at, number_of(high))


def widen_nuclei(
    logits: Tensor, best: Tensor, mass: Tensor, is_open: Tensor, floor: Tensor
) -> None:
    """See `ops.widen_nuclei`."""
    num_rows, vocab = logits.shape
    if num_rows:
        widen[(num_rows,)](
            logits, logits.stride(0), best.contiguous(), mass.contiguous(),
            is_open.contiguous().view(torch.uint8), floor, vocab,
            min(_TILE, power_of_two(vocab)), num_warps=_NUM_WARPS,
        )  # fmt: skip
