"""One mover over those of all ranks, whose answers come at different times and differ."""

from __future__ import annotations

import random

import pytest
from hand_mover import HandMover

from tierkv.engine.tp.mover import TpMover, worst
from tierkv.protocols import Mover
from tierkv.types import Erasure, Move, MoveFailure, MovePriority, MoveResult, TierName

GPU, NVME = TierName.GPU, TierName.NVME


def move(ticket: int) -> Move:
    priority = MovePriority.WRITE_BACK
    return Move(ticket, b"k" * 16, b"p" * 16, b"", GPU, ticket, NVME, ticket, priority)


def ranks(count: int = 2) -> tuple[TpMover, list[HandMover]]:
    movers = [HandMover() for _ in range(count)]
    joined: Mover = TpMover(movers)
    assert isinstance(joined, TpMover)
    return joined, movers


def test_a_move_ends_with_the_last_rank() -> None:
    joined, (first, second) = ranks()
    moves = [move(1), move(2)]
    joined.begin(moves)
    assert first.moves == second.moves == moves
    second.end(moves[1], seconds=3.0)
    first.end(moves[0], seconds=1.0)
    assert joined.poll() == []
    first.end(moves[1], seconds=2.0)
    assert joined.poll() == [MoveResult(2, None, 3.0)]
    assert joined.poll() == []
    second.end(moves[0])
    assert joined.poll() == [MoveResult(1, None, 1.0)]


def test_one_failure_fails_the_move_and_waits_for_the_others() -> None:
    joined, (first, second) = ranks()
    joined.begin([move(1)])
    first.end(first.moves[0], MoveFailure.NO_SPACE)
    assert joined.poll() == []
    second.end(second.moves[0])
    assert joined.poll() == [MoveResult(1, MoveFailure.NO_SPACE, 0.5)]


@pytest.mark.parametrize(
    ("failures", "answer"),
    [
        ((MoveFailure.LATE, MoveFailure.CORRUPT, None), MoveFailure.CORRUPT),
        ((MoveFailure.IO_ERROR, MoveFailure.LOST), MoveFailure.LOST),
        ((None, MoveFailure.UNAVAILABLE, MoveFailure.IO_ERROR), MoveFailure.IO_ERROR),
        ((MoveFailure.UNAVAILABLE, MoveFailure.NO_SPACE), MoveFailure.NO_SPACE),
        ((None, MoveFailure.LATE), MoveFailure.LATE),
        ((None, None), None),
    ],
)
def test_the_worst_failure_counts(
    failures: tuple[MoveFailure | None, ...], answer: MoveFailure | None
) -> None:
    joined, movers = ranks(len(failures))
    joined.begin([move(1)])
    order = list(zip(movers, failures, strict=True))
    random.Random(len(failures)).shuffle(order)
    for mover, failure in order:
        mover.end(mover.moves[0], failure)
    assert [result.failure for result in joined.poll()] == [answer]
    assert worst(*reversed(failures)) is answer


def test_every_failure_has_a_severity() -> None:
    for failure in MoveFailure:
        assert worst(None, failure) is failure


def test_a_slot_is_released_when_no_rank_needs_it() -> None:
    joined, (first, second) = ranks()
    joined.begin([move(1), move(2), move(3)])
    one, two, three = first.moves
    first.release(one)
    assert joined.poll_released() == []
    second.release(one)
    assert joined.poll_released() == [1]
    assert joined.poll_released() == []
    first.end(two)  # one rank is done, the other goes on without the pool
    second.release(two)
    assert joined.poll_released() == [2]
    first.release(three)
    second.release(three)
    for mover in (first, second):
        mover.end(three)
    assert [result.ticket for result in joined.poll()] == [3]
    assert joined.poll_released() == []  # its result says so
    for mover in (first, second):
        for left in list(mover.moves):
            mover.end(left) if left is one or mover is second else None
    assert sorted(result.ticket for result in joined.poll()) == [1, 2]


def test_a_release_that_nobody_polled_goes_with_the_result() -> None:
    joined, movers = ranks()
    joined.begin([move(7)])
    for mover in movers:
        mover.release(mover.moves[0])
    joined.wait(0.0)
    for mover in movers:
        mover.end(mover.moves[0])
    assert [result.ticket for result in joined.poll()] == [7]
    assert joined.poll_released() == []


def test_an_erasure_ends_with_the_last_rank() -> None:
    joined, (first, second) = ranks()
    joined.erase([4, 5])
    first.end_erasing()
    assert joined.poll_erased() == []
    second.end_erasing(MoveFailure.IO_ERROR)
    failed = [Erasure(4, MoveFailure.IO_ERROR), Erasure(5, MoveFailure.IO_ERROR)]
    assert joined.poll_erased() == failed
    joined.erase([5])
    joined.erase([5])  # asked for twice, and answered once by one of them
    first.erasing = [5]
    first.end_erasing()
    second.end_erasing()
    assert joined.poll_erased() == [Erasure(5, None)]
    assert joined.poll_erased() == []


def test_every_rank_is_told() -> None:
    joined, movers = ranks(3)
    joined.touch([1, 2])
    joined.abandon([9])
    assert [mover.touched for mover in movers] == [[[1, 2]]] * 3
    assert [mover.abandoned for mover in movers] == [[9]] * 3


def test_a_tier_is_sick_where_one_rank_says_so() -> None:
    joined, (_, second) = ranks()
    assert not joined.is_quarantined(is_read=True)
    second.quarantined.add(True)
    assert joined.is_quarantined(is_read=True)
    assert not joined.is_quarantined(is_read=False)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_gives_each_result_once(seed: int) -> None:
    rng = random.Random(seed)
    joined, movers = ranks(rng.randint(1, 4))
    failures: dict[int, list[MoveFailure | None]] = {}
    found: dict[int, MoveFailure | None] = {}
    released: set[int] = set()
    number = 0
    while number < 60 or any(mover.moves for mover in movers):
        if number < 60 and rng.random() < 0.5:
            number += 1
            joined.begin([move(number)])
            failures[number] = []
        mover = rng.choice(movers)
        if mover.moves:
            chosen = rng.choice(mover.moves)
            if rng.random() < 0.3:
                mover.release(chosen)
            failure = rng.choice([None, None, *MoveFailure])
            failures[chosen.ticket].append(failure)
            mover.end(chosen, failure)
        for ticket in joined.poll_released() if rng.random() < 0.5 else []:
            assert ticket not in released and ticket not in found
            released.add(ticket)
        for result in joined.poll() if rng.random() < 0.5 else []:
            assert result.ticket not in found
            assert len(failures[result.ticket]) == len(movers)
            found[result.ticket] = result.failure
    found |= {result.ticket: result.failure for result in joined.poll()}
    assert found == {ticket: worst(*answers) for ticket, answers in failures.items()}
