"""Virtual time goes forward, and only when it is told to."""

from __future__ import annotations

import pytest

from tierkv.errors import InvariantError
from tierkv.sim.clock import VirtualClock


def test_time_stands_still() -> None:
    clock = VirtualClock(3.0)
    assert [clock.now(), clock.now()] == [3.0, 3.0]


def test_time_advances_by_and_to() -> None:
    clock = VirtualClock()
    clock.advance(1.5)
    clock.advance(0.0)
    assert clock.now() == 1.5
    clock.advance_to(4.0)
    assert clock.now() == 4.0


def test_a_time_that_is_over_changes_nothing() -> None:
    clock = VirtualClock(10.0)
    clock.advance_to(9.0)
    assert clock.now() == 10.0


@pytest.mark.parametrize("seconds", [-1e-9, float("nan")])
def test_time_does_not_go_back(seconds: float) -> None:
    clock = VirtualClock(1.0)
    with pytest.raises(InvariantError, match="cannot advance by"):
        clock.advance(seconds)
    assert clock.now() == 1.0
