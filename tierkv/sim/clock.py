"""Virtual time: it moves when somebody says so."""

from __future__ import annotations

from tierkv.errors import InvariantError


class VirtualClock:
    """A `Clock` of simulated seconds.

    Args:
        start_s: what it shows at first.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let so much time pass.

        Raises:
            InvariantError: less than none.
        """
        if not seconds >= 0:
            raise InvariantError(f"virtual time cannot advance by {seconds} s")
        self._now += seconds

    def advance_to(self, time_s: float) -> None:
        """Let time pass until `time_s`; a time that is over changes nothing."""
        self._now = max(self._now, time_s)
