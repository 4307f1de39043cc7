"""The floors of wide nuclei, by Triton's kernel and by torch, against the oracle.

Every floor lies between the oracle's for a little more and a little less mass: sums are rounded.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_steps import DEVICE, on_device

from tierkv.kernels import reference
from tierkv.kernels.triton import nucleus

LOWEST = torch.finfo(torch.float32).min
MARGIN = 1e-5  # of mass: rounding of 128,256 weights and of their sum is below a third of it

full = pytest.mark.full


def masked(rows: int, vocab: int) -> Tensor:
    logits = torch.randn(rows, vocab)
    logits[:, 1:].masked_fill_(torch.rand(rows, vocab - 1) < 0.7, -torch.inf)
    return logits


def signed_zeros(rows: int, vocab: int) -> Tensor:
    values = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])
    return values[torch.randint(0, 6, (rows, vocab))]


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda rows, vocab: torch.randn(rows, vocab) * 2 + 5,
    "flat": lambda rows, vocab: torch.rand(rows, vocab) * 1e-3 - 20,
    "peaked": lambda rows, vocab: torch.randn(rows, vocab) * 7,
    "ties": lambda rows, vocab: torch.randint(-40, 40, (rows, vocab)) / 8,
    "equal": lambda rows, vocab: torch.randn(rows, 1).expand(rows, vocab),
    "tiny": lambda rows, vocab: torch.randn(rows, vocab) * 1e-41,
    "huge": lambda rows, vocab: torch.randn(rows, vocab) * 1e30,
    "masked": masked,
    "signed_zeros": signed_zeros,
}


def problem(
    rng: random.Random, kind: str, vocab: int, rows: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the op; rows have gaps of what would be the best, one is not open."""
    memory = torch.full((rows, vocab + rng.randrange(4)), torch.inf)
    logits = memory[:, :vocab]
    logits[:] = KINDS[kind](rows, vocab)
    best = logits.amax(-1)
    weights = (logits.double() - best[:, None]).exp()
    share = torch.tensor([rng.uniform(0.02, 1.0) for _ in range(rows)])
    mass = (share * weights.sum(-1)).float()
    is_open = torch.ones(rows, dtype=torch.bool)
    is_open[rng.randrange(rows)] = False
    return logits, best, mass, is_open, best.clone()  # which is always kept


def triton_floor(
    logits: Tensor, best: Tensor, mass: Tensor, is_open: Tensor, floor: Tensor
) -> Tensor:
    found = floor.clone().to(DEVICE)
    nucleus.widen_nuclei(
        on_device(logits), *(x.to(DEVICE) for x in (best, mass, is_open)), floor=found
    )
    return found.cpu()


def oracle(logits: Tensor, best: Tensor, mass: Tensor, is_open: Tensor, floor: Tensor) -> Tensor:
    found = floor.clone()
    reference.widen_nuclei(logits, best, mass, is_open, found)
    return found


@pytest.mark.parametrize("vocab", [1, 7, 1000, 4096, 32003, pytest.param(128_256, marks=full)])
@pytest.mark.parametrize("kind", KINDS)
def test_floors(kind, vocab, rng) -> None:
    logits, best, mass, is_open, floor = problem(rng, kind, vocab)
    found = triton_floor(logits, best, mass, is_open, floor)
    assert torch.equal(found[~is_open], floor[~is_open])
    low = oracle(logits, best, mass * (1 + MARGIN), is_open, floor)[is_open]
    high = oracle(logits, best, mass * (1 - MARGIN), is_open, floor)[is_open]
    found, logits = found[is_open], logits[is_open]
    assert ((low <= found) & (found <= high)).all(), (low, found, high)
    assert ((found == LOWEST) | (logits == found[:, None]).any(-1)).all()


@pytest.mark.parametrize("vocab", [1000, 32003])
def test_between_two_sums_nothing_is_left_to_rounding(vocab, rng) -> None:
    """Mass halfway up a step of the sum: the floor is the step's logit, and all its ties."""
    logits = torch.randn(1, vocab) * 2
    logits[0, rng.sample(range(vocab), vocab // 9)] = float(logits[0].topk(vocab // 4).values[-1])
    best = logits.amax(-1)
    ordered = logits[0].sort(descending=True).values
    at = vocab // 4 + rng.randrange(2)
    above = (ordered[ordered > ordered[at]].double() - best).exp().sum()
    equal = (ordered[ordered == ordered[at]].double() - best).exp().sum()
    mass = (above + equal / 2).float()[None]
    for start in (best, ordered[at][None], ordered[at // 2][None]):
        found = triton_floor(logits, best, mass, torch.tensor([True]), start)
        assert found == ordered[at]


@pytest.mark.parametrize("find", [triton_floor, oracle])
@pytest.mark.parametrize("num_best", [1, 8, 1000])
def test_a_mass_that_is_reached_exactly_is_enough(find, num_best, rng) -> None:
    """Weights of 1 and of nothing: the last 1 completes the mass, and no other token is kept."""
    logits = torch.full((1, 2000), -200.0)
    logits[0, rng.sample(range(2000), num_best)] = 0.0
    arguments = torch.zeros(1), torch.tensor([float(num_best)]), torch.tensor([True])
    for start in (0.0, 1e-30 * rng.random(), 100 * rng.random(), 1e30 * rng.random()):
        assert find(logits, *arguments, torch.tensor([start])) == 0.0


def test_where_all_logits_have_too_little_mass_all_are_kept(rng) -> None:
    logits, best, mass, is_open, floor = problem(rng, "masked", 1000)
    for total in (mass * 100, mass * torch.inf):
        found = triton_floor(logits, best, total, is_open, floor)
        assert (found[is_open] == LOWEST).all()


def test_a_row_has_the_same_floor_in_any_batch(rng) -> None:
    logits, best, mass, is_open, floor = problem(rng, "flat", 9999, rows=5)
    together = triton_floor(logits, best, mass, is_open, floor)
    order = torch.tensor(rng.sample(range(5), 3))
    some = triton_floor(*(x[order] for x in (logits, best, mass, is_open, floor)))
    assert torch.equal(together[order], some)


def test_no_rows_and_rows_of_strided_arguments(rng) -> None:
    empty = torch.zeros(0, device=DEVICE)
    nucleus.widen_nuclei(empty[:, None].expand(0, 9), empty, empty, empty.bool(), empty)
    logits, best, mass, is_open, floor = problem(rng, "normal", 1000)
    pairs = [torch.stack([x, x], 1)[:, 0] for x in (best, mass, is_open)]
    wanted = triton_floor(logits, best, mass, is_open, floor)
    found = triton_floor(logits, *pairs, floor=floor)
    assert torch.equal(found, wanted)


def test_rows_past_two_to_the_31() -> None:
    """A row's place that 32 bits do not count; pages that nothing touches cost no memory."""
    stride = 2**30
    memory = torch.empty(2 * stride + 1000, device=DEVICE)
    logits = memory.as_strided((3, 1000), (stride, 1))
    logits[:] = torch.randn(3, 1000).to(DEVICE)
    best = logits.amax(-1)
    mass = (logits - best[:, None]).exp().sum(-1) * 0.6
    is_open = torch.ones(3, dtype=torch.bool, device=DEVICE)
    found = best.clone()
    nucleus.widen_nuclei(logits, best, mass, is_open, found)
    compact = best.clone()
    nucleus.widen_nuclei(logits.contiguous(), best, mass, is_open, compact)
    assert torch.equal(found, compact) and (found < best).all()
