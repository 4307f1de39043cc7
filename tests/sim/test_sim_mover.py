"""When moves end in virtual time, in which order, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from mover_worlds import move

from tierkv.errors import InvariantError
from tierkv.sim.clock import VirtualClock
from tierkv.sim.mover import CPU, GPU, NVME, Fault, Link, LinkSpec, SimMover
from tierkv.types import Erasure, Move, MoveFailure, MovePriority, MoveResult

SIZE = 100
DEMAND, WRITE_BACK = MovePriority.DEMAND, MovePriority.WRITE_BACK


class Bench:
    """A mover whose blocks have 100 bytes, and when its moves ended."""

    def __init__(
        self,
        links: dict[Link, LinkSpec],
        devices: dict[str, float] | None = None,
        fault: Callable[[Move], Fault | None] | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self.mover = SimMover(self.clock, links, devices or {}, SIZE, fault)
        self.ended: dict[int, float] = {}
        self.results: dict[int, MoveResult] = {}
        self._slots = count()

    def begin(self, link: Link, *tickets: int, priority: MovePriority = DEMAND) -> None:
        places = [((link[0], next(self._slots)), (link[1], next(self._slots))) for _ in tickets]
        moves = [move(t, t, *ends, priority) for t, ends in zip(tickets, places, strict=True)]
        self.mover.begin(moves)

    def run(self) -> dict[int, float]:
        """Jump from event to event until nothing moves; when each move ended."""
        while (event := self.mover.next_event_s()) is not None:
            self.clock.advance_to(event)
            self.poll()
        return self.ended

    def poll(self) -> None:
        self.mover.poll_released()
        for result in self.mover.poll():
            self.ended[result.ticket] = self.clock.now()
            self.results[result.ticket] = result


def test_a_link_takes_one_block_after_the_other_and_its_latency_once() -> None:
    bench = Bench({(CPU, GPU): LinkSpec(SIZE / 2.0, 0.5)})  # 2 s a block
    bench.begin((CPU, GPU), 1, 2, 3)
    assert bench.run() == {1: 2.5, 2: 4.5, 3: 6.5}
    assert [result.seconds for result in bench.results.values()] == [2.0, 2.0, 2.0]


def test_two_directions_do_not_disturb_each_other() -> None:
    bench = Bench({(CPU, GPU): LinkSpec(SIZE), (GPU, CPU): LinkSpec(SIZE)})
    bench.begin((CPU, GPU), 1, 2)
    bench.begin((GPU, CPU), 3, 4)
    assert bench.run() == {1: 1.0, 2: 2.0, 3: 1.0, 4: 2.0}


def test_links_of_one_device_share_it_in_turns() -> None:
    links = {(NVME, GPU): LinkSpec(SIZE, 0.0, "drive"), (CPU, NVME): LinkSpec(SIZE, 0.0, "drive")}
    bench = Bench(links, {"drive": SIZE})
    bench.begin((NVME, GPU), 1, 2)
    bench.begin((CPU, NVME), 3, 4)
    assert bench.run() == {1: 1.0, 3: 2.0, 2: 3.0, 4: 4.0}


def test_turns_are_fair_also_when_nobody_looks_for_long() -> None:
    links = {(NVME, GPU): LinkSpec(SIZE, 0.0, "drive"), (CPU, NVME): LinkSpec(SIZE, 0.0, "drive")}
    bench = Bench(links, {"drive": SIZE})
    bench.begin((NVME, GPU), *range(10))
    bench.begin((CPU, NVME), *range(10, 20))
    bench.clock.advance_to(10.0)
    bench.poll()
    assert len(bench.ended) == 10
    assert sum(ticket < 10 for ticket in bench.ended) == 5


def test_a_device_that_is_fast_enough_slows_nobody() -> None:
    links = {(CPU, GPU): LinkSpec(SIZE, 0.0, "bus"), (GPU, CPU): LinkSpec(SIZE, 0.0, "bus")}
    bench = Bench(links, {"bus": 2.0 * SIZE})
    bench.begin((CPU, GPU), 1, 2)
    bench.begin((GPU, CPU), 3, 4)
    assert bench.run() == {1: 1.0, 2: 2.0, 3: 1.0, 4: 2.0}


def test_the_most_urgent_waits_for_one_block_at_most() -> None:
    bench = Bench({(CPU, GPU): LinkSpec(SIZE)})
    bench.begin((CPU, GPU), 1, 2, priority=WRITE_BACK)
    bench.clock.advance(0.5)
    bench.begin((CPU, GPU), 3, 4)
    assert bench.run() == {1: 1.0, 3: 2.0, 4: 3.0, 2: 4.0}


def test_what_comes_later_takes_no_turn_that_was_over() -> None:
    bench = Bench({(CPU, GPU): LinkSpec(SIZE)})
    bench.begin((CPU, GPU), 1, 2, priority=WRITE_BACK)
    bench.clock.advance(1.5)  # the second is half done, though nobody has looked
    bench.begin((CPU, GPU), 3)
    assert bench.run() == {1: 1.5, 2: 2.0, 3: 3.0}


def test_a_write_from_the_pool_lets_go_of_it_when_its_turn_comes() -> None:
    bench = Bench({(GPU, NVME): LinkSpec(SIZE)})
    bench.begin((GPU, NVME), 1, 2)
    assert bench.mover.poll_released() == [1]
    assert bench.mover.poll() == []
    bench.mover.wait(10.0)
    assert bench.clock.now() == 1.0
    assert [result.ticket for result in bench.mover.poll()] == [1]
    assert bench.mover.poll_released() == [2]
    assert bench.run() == {2: 2.0}


def test_only_writes_from_the_pool_to_the_drive_are_released() -> None:
    bench = Bench({(GPU, CPU): LinkSpec(SIZE), (CPU, NVME): LinkSpec(SIZE)})
    bench.begin((GPU, CPU), 1)
    bench.begin((CPU, NVME), 2)
    assert bench.mover.poll_released() == []


def test_a_release_that_the_result_overtook_is_not_told() -> None:
    bench = Bench({(GPU, NVME): LinkSpec(SIZE)})
    bench.begin((GPU, NVME), 1)
    bench.clock.advance(1.0)
    assert [result.ticket for result in bench.mover.poll()] == [1]
    assert bench.mover.poll_released() == []


def test_what_nobody_wants_is_released_at_once_and_ends_late() -> None:
    bench = Bench({(NVME, GPU): LinkSpec(SIZE)})
    bench.begin((NVME, GPU), 1, 2)
    bench.mover.abandon([2])
    bench.mover.abandon([2])
    assert bench.mover.poll_released() == [2]
    assert bench.run() == {1: 1.0, 2: 2.0}
    assert bench.results[1].failure is None
    assert bench.results[2].failure is MoveFailure.LATE


def test_waiting_ends_with_the_first_move_or_the_time() -> None:
    bench = Bench({(CPU, GPU): LinkSpec(SIZE)})
    bench.mover.wait(0.25)
    assert bench.clock.now() == 0.25
    bench.begin((CPU, GPU), 1)
    bench.mover.wait(0.5)
    assert bench.clock.now() == 0.75
    bench.mover.wait(9.0)
    assert bench.clock.now() == 1.25
    bench.mover.wait(9.0)
    assert bench.clock.now() == 1.25  # there is something to poll


def test_erasures_are_something_to_poll() -> None:
    bench = Bench({(CPU, NVME): LinkSpec(SIZE)})
    bench.mover.erase([4, 2, 4])
    bench.mover.wait(1.0)
    assert bench.clock.now() == 0.0
    assert bench.mover.poll_erased() == [Erasure(4, None), Erasure(2, None)]
    assert bench.mover.poll_erased() == []
    assert bench.mover.next_event_s() is None


def test_a_fault_delays_a_move_and_no_other() -> None:
    faults = {1: Fault(7.0), 2: Fault(failure=MoveFailure.CORRUPT)}
    bench = Bench({(NVME, CPU): LinkSpec(SIZE)}, fault=lambda move: faults.get(move.ticket))
    bench.begin((NVME, CPU), 1, 2, 3)
    assert bench.run() == {2: 2.0, 3: 3.0, 1: 8.0}
    failures = [bench.results[ticket].failure for ticket in (1, 2, 3)]
    assert failures == [None, MoveFailure.CORRUPT, None]


def test_what_links_carried_is_counted() -> None:
    bench = Bench({(CPU, GPU): LinkSpec(SIZE, 5.0), (GPU, CPU): LinkSpec(SIZE)})
    bench.begin((CPU, GPU), 1, 2, 3)
    bench.run()
    use = bench.mover.uses[CPU, GPU]
    assert (use.num_moves, use.busy_s, use.queued_s) == (3, 3.0, 1.0 + 2.0)
    assert bench.mover.uses[GPU, CPU].num_moves == 0


def test_callers_bugs_are_loud() -> None:
    bench = Bench({(CPU, GPU): LinkSpec(SIZE)})
    with pytest.raises(InvariantError, match="no link gpu -> cpu"):
        bench.begin((GPU, CPU), 1)
    bench.begin((CPU, GPU), 2)
    bench.mover.close()
    bench.mover.close()
    with pytest.raises(InvariantError, match="closed"):
        bench.begin((CPU, GPU), 3)
    assert bench.run() == {2: 1.0}
