"""What happens to an engine: requests, and everything that may come between them.

Prefixes are shared, conversations come back, strangers push them out of the pool, and every now
and then somebody aborts, sleeps, pins, forgets, exports, or pulls the plug.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tierkv.sim.chaos.contents import VOCAB
from tierkv.sim.chaos.faults import Weather

TENANTS = ("", "a", "b")
NUM_FAMILIES = 3

PREFIXES = [[(7 * i + j * (i + 1)) % VOCAB for j in range(60)] for i in range(NUM_FAMILIES)]
"""Prompts of one family begin alike."""

CALM = Weather()
WEATHERS = (
    CALM,
    Weather(failures=0.05, delays=0.05, delay_s=0.2, erase_failures=0.1),
    Weather(failures=0.3, delays=0.2, delay_s=0.5, erase_failures=0.5),
    Weather(delays=0.3, delay_s=3.0),
    Weather(failures=0.02, is_read_closed=True),
    Weather(failures=0.02, is_write_closed=True),
    Weather(failures=1.0, erase_failures=1.0),
)


@dataclass(slots=True, frozen=True)
class Op:
    """Something that happens: its name, and what it needs to know."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.values.items() if v)])


class Author:
    """Draws histories.

    Args:
        rng: decides.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._families = rng.choice([range(1), range(2), range(NUM_FAMILIES)])
        self._tenants = rng.choice([TENANTS[:1], TENANTS[1:2], TENANTS[:2], TENANTS])
        self._kept: list[dict[str, Any]] = []
        self._kinds: dict[str, tuple[int, Callable[[], list[Op]]]] = {
            "ask": (22, lambda: [self._ask()]),
            "chat": (12, self._chat),
            "stranger": (12, self._stranger),
            "beam": (3, self._beam),
            "storm": (3, self._storm),
            "step": (33, lambda: [Op("step", {"count": rng.randint(1, 8)})]),
            "run": (9, lambda: [Op("step", {"count": 60})]),
            "abort": (5, lambda: [Op("abort", {"which": rng.randrange(8)})]),
            "stop": (2, lambda: [Op("stop", {"which": rng.randrange(8)})]),
            "pass": (3, lambda: [Op("pass", {"seconds": rng.choice([0.01, 0.5, 5.0])})]),
            "weather": (4, lambda: [Op("weather", {"weather": rng.choice(WEATHERS)})]),
            "reset": (1, lambda: [Op("reset")]),
            "keep": (4, self._keep),
            "nap": (1, self._nap),
            "export": (1, self._export),
            "restart": (3, lambda: [Op("restart", {"is_clean": rng.random() < 0.4})]),
        }

    def history(self, num_ops: int) -> list[Op]:
        """About so many operations."""
        ops: list[Op] = []
        names, weights = [*self._kinds], [weight for weight, _ in self._kinds.values()]
        while len(ops) < num_ops:
            (name,) = self._rng.choices(names, weights)
            ops += self._kinds[name][1]()
        return ops

    # ------------------------------------------------------------------ requests

    def _ask(self, **given: Any) -> Op:
        """A request whose prompt begins as its family's do."""
        return Op("ask", {"family": self._family(), **self._request(), **given})

    def _family(self) -> int:
        return self._rng.choice(self._families)

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(VOCAB) for _ in range(count)]

    def _request(self) -> dict[str, Any]:
        rng = self._rng
        return {
            "length": rng.choice([0, 10, 23, 40, 40, 60]),
            "suffix": self._tokens(rng.randint(1, 8)),
            "max_tokens": rng.randint(1, 12),
            "n": rng.choice([1, 1, 1, 1, 2, 4]),
            "priority": rng.randrange(3),
            "tenant": rng.choice(self._tenants),
            "stop": rng.choice([None, None, None, rng.randrange(VOCAB)]),
            "hints": self._hints(),
        }

    def _hints(self) -> dict[str, Any]:
        rng = self._rng
        if rng.random() < 0.6:
            return {}
        return {
            "ttl": rng.choice([None, None, 0.0, 0.05, 1.0]),
            "priority": rng.choice([0, 0, -5, 5]),
            "no_store": rng.random() < 0.15,
            "session_id": rng.choice(["", "s0", "s0", "s1"]),
            "turn": rng.choice(["", "end", "tool_call"]),
        }

    def _chat(self) -> list[Op]:
        """The next turn of a conversation, if there has been one."""
        return [Op("chat", {"which": self._rng.randrange(8), **self._request()})]

    def _stranger(self) -> list[Op]:
        """Somebody with a long prompt that nobody else has."""
        return [self._ask(length=0, suffix=self._tokens(50), n=1, hints={})]

    def _beam(self) -> list[Op]:
        request = self._request()
        values = {name: request[name] for name in ("length", "suffix", "tenant")}
        return [Op("beam", {"family": self._family(), "depth": 5, **values})]

    def _storm(self) -> list[Op]:
        """Many at once with one prefix."""
        rng = self._rng
        shared = {"family": self._family(), "tenant": rng.choice(self._tenants), "length": 40}
        return [self._ask(**shared) for _ in range(rng.randint(3, 8))]

    # ------------------------------------------------------------------ what else happens

    def _keep(self) -> list[Op]:
        """Somebody wants a prefix or a session kept, or not any more."""
        rng = self._rng
        if self._kept and rng.random() < 0.5:
            values = {**rng.choice(self._kept), "ttl": rng.choice([None, 0.0, 0.05, 2.0])}
            return [Op(rng.choice(["pin", "unpin", "ttl"]), values)]
        tenant, family, length = rng.choice(self._tenants), self._family(), rng.choice([10, 40])
        session = rng.choice([None, "s0"])
        hints = {} if session is None else {"session_id": session}
        self._kept.append(
            {"tenant": tenant, "family": family, "length": length, "session": session}
        )
        ask = self._ask(tenant=tenant, family=family, length=length, hints=hints)
        pin = Op("pin", {**self._kept[-1], "ttl": rng.choice([None, None, 0.5])})
        return [ask, Op("step", {"count": 20}), pin]

    def _nap(self) -> list[Op]:
        """Sleep, mostly until woken, with something happening meanwhile."""
        meanwhile = [self._ask()] if self._rng.random() < 0.5 else []
        steps = Op("step", {"count": self._rng.choice([0, 3, 30])})
        return [Op("sleep"), *meanwhile, steps, Op("wake")]

    def _export(self) -> list[Op]:
        """A session leaves, is forgotten, and comes back."""
        rng, tenant = self._rng, self._rng.choice(self._tenants)
        ask = self._ask(hints={"session_id": "s0"}, tenant=tenant, length=40)
        export = Op("export", {"tenant": tenant, "session": "s0"})
        between = Op("reset") if rng.random() < 0.7 else Op("restart", {"is_clean": True})
        return [ask, Op("step", {"count": 60}), export, between, Op("import")]
