"""Plays a scenario, and checks after every step that no law is broken.

Always: the cache's conservation laws and tenants' quotas; every block that is read holds what it
should; every token is the right one; no sequence goes on after its end.
At resets: what was forgotten is gone from the persistent tier.
At the end: every request has ended, within bounded time; nothing is held, and nothing moves.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.kv_hints import KvHints
from tierkv.engine.request import SeqState
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import InvariantError, RequestError
from tierkv.sim.chaos.answers import Answers, Asked
from tierkv.sim.chaos.beams import Beam
from tierkv.sim.chaos.contents import Contents
from tierkv.sim.chaos.faults import Faults, Weather
from tierkv.sim.chaos.history import PREFIXES
from tierkv.sim.chaos.log import Log
from tierkv.sim.chaos.scenario import Scenario
from tierkv.sim.chaos.world import World
from tierkv.sim.clock import VirtualClock
from tierkv.sim.mover import GPU

_TICK_S = 1e-3
_LEAP_S = 0.05
_PATIENCE_S = 60.0
_PATIENCE_STEPS = 2000
_IDLE_STEPS = 500
_COUNTED = (
    *("steps", "computed_tokens", "generated_tokens", "hit_tokens", "preemptions", "swaps"),
    *("loads_chosen", "recomputes_chosen"),
)


class Run:
    """One engine after the other, over one persistent tier.

    Args:
        scenario: what is played.
        seed: of what goes wrong.

    Attributes:
        log: what happened.
        contents: what is where.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self._scenario = scenario
        self._clock = VirtualClock()
        self.log = Log(self._clock)
        self._rng = Random(f"{seed} restarts")
        self._faults = Faults(Random(f"{seed} faults"), scenario.weather)
        self.contents = Contents(
            self._clock,
            scenario.options["block_size"],
            scenario.blocks,
            scenario.window,
            scenario.time,
        )
        self._answers = Answers()
        self._counts: Counter[str] = Counter()
        self._num_checked = 0
        self._exported: list[tuple[str, list[Any]]] = []
        self._world = self._start([])

    def _start(self, stored: list[Any]) -> World:
        world = World(self._scenario, self._clock, self.contents, self._faults, self.log, stored)
        world.core.check()
        return world

    @property
    def core(self) -> EngineCore:
        return self._world.core

    def play(self) -> None:
        """All of it, and the end."""
        for op in self._scenario.ops:
            self.log.add("op", str(op))
            self._counts[op.name] += 1
            getattr(self, f"_do_{op.name}")(**op.values)
            self.core.check()
        self._finish()

    def tally(self) -> Counter[str]:
        """How often what happened, over all engines of the run."""
        return self._counts + self._of_engine() + self._answers.tally()

    def _of_engine(self) -> Counter[str]:
        cache, metrics = self.core.cache, self.core.scheduler.metrics
        counts = Counter({name: getattr(metrics, name) for name in _COUNTED})
        counts["strays joined"] = cache.tree.num_joined
        if cache.moves is None:
            return counts
        for (source, to), stats in cache.moves.stats.items():
            counts[f"{source.value}->{to.value}"] += stats.num_moves
            counts.update({failure.value: n for failure, n in stats.failures.items()})
        counts["rescued"], counts["joined"] = cache.moves.num_rescued, cache.loads.num_joined
        counts["prefetched"], counts["tails"] = cache.loads.num_prefetched, cache.loads.num_tails
        if cache.moves.erasures is not None:
            counts["erasures failed"] = cache.moves.erasures.num_failures
        return counts

    # ------------------------------------------------------------------ steps and time

    def _step(self) -> None:
        before, num_tokens = self._clock.now(), self._num_computed()
        outputs = self.core.step()
        if (count := self._num_computed() - num_tokens) != 0:
            self.log.add("step", count)
        for output in outputs:
            reason = output.finish_reason.value if output.finish_reason is not None else ""
            self.log.add("says", output.request_id, output.index, *output.new_token_ids, reason)
        self._answers.take(outputs, self.core)
        self._check()
        if self._clock.now() == before:
            self._let_time_pass()

    def _check(self) -> None:
        """Every law, unless nothing has happened."""
        if len(self.log) != self._num_checked:
            self.core.check()
            self._check_quotas()
            self._num_checked = len(self.log)

    def _check_quotas(self) -> None:
        """No tenant keeps more below the pool than it may, but what a restart has found."""
        if self._counts["restart"]:
            return
        lower = [tier for tier in self._scenario.blocks if tier is not GPU]
        for share in self.core.cache.shares.values():
            for tier in lower:
                if (excess := share.num_over(tier)) > 0:
                    raise InvariantError(f"{share.tenant} has {excess} too many in {tier.value}")

    def _num_computed(self) -> int:
        return self.core.scheduler.metrics.computed_tokens

    def _let_time_pass(self) -> None:
        """Until something ends, but not for long: a server waits for requests too."""
        now = self._clock.now()
        mover = self._world.mover
        event = mover.next_event_s() if mover is not None else None
        until = now + _LEAP_S if event is None else min(event, now + _LEAP_S)
        self._clock.advance_to(max(until, now + _TICK_S))

    # ------------------------------------------------------------------ requests

    def _do_ask(self, family: int, length: int, suffix: list[int], **values: Any) -> None:
        self._ask([*PREFIXES[family][:length], *suffix], **values)

    def _do_chat(self, which: int, suffix: list[int], length: int, **values: Any) -> None:
        chats = self._answers.chats()
        if chats:
            salt, tokens = chats[-1 - which % len(chats)]
            self._ask([*tokens, *suffix], **{**values, "tenant": salt})

    def _ask(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        priority: int,
        tenant: str,
        stop: int | None,
        hints: dict[str, Any],
    ) -> None:
        stops = [] if stop is None else [stop]
        params = SamplingParams(max_tokens=max_tokens, n=n, stop_token_ids=stops)
        given = KvHints.parse(hints or None)
        if (name := self._add(prompt, params, tenant, priority=priority, hints=given)) is not None:
            asked = Asked(name, prompt, tenant, max_tokens, n, frozenset(stops))
            self._answers.asked[name] = asked

    def _add(
        self, prompt: list[int], params: SamplingParams, tenant: str, **values: Any
    ) -> str | None:
        """Queue a request; its name, unless the engine refuses it."""
        name = self._answers.new_name
        request = EngineRequest(name, prompt, params, cache_salt=tenant, tenant=tenant, **values)
        try:
            self.core.add_request(request)
        except RequestError as error:
            self.log.add("refused", type(error).__name__)
            return None
        return name

    def _do_beam(
        self, family: int, length: int, suffix: list[int], depth: int, tenant: str
    ) -> None:
        """A request whose caller chooses every token."""
        prompt, params = [*PREFIXES[family][:length], *suffix], SamplingParams(max_tokens=depth + 1)
        if (name := self._add(prompt, params, tenant, is_stepped=True)) is not None:
            self._answers.beams[name] = Beam(name, prompt, tenant, depth, self._rng)

    def _live(self, which: int) -> str | None:
        live = list(self.core.scheduler.requests)
        return live[which % len(live)] if live else None

    def _do_abort(self, which: int) -> None:
        if (name := self._live(which)) is not None:
            self._answers.aborted(name)
            self.core.abort([name])

    def _do_stop(self, which: int) -> None:
        """The front end has seen a stop string in one of the sequences."""
        if (name := self._live(which)) is not None and name in self._answers.asked:
            sequences = self.core.scheduler.requests[name].sequences
            live = [seq.index for seq in sequences if seq.state is not SeqState.FINISHED]
            index = live[which % len(live)]
            self._answers.asked[name].stopped.add(index)
            self.core.stop_sequence(name, index)

    # ------------------------------------------------------------------ what else happens

    def _do_step(self, count: int) -> None:
        for _ in range(count):
            if not self.core.has_work and not self.core.has_background_work:
                break
            self._step()

    def _do_pass(self, seconds: float) -> None:
        self._clock.advance(seconds)
        if not self.core.has_work:
            self.core.work_in_background()

    def _do_weather(self, weather: Weather) -> None:
        self._faults.weather = weather

    def _do_sleep(self) -> None:
        self.core.control.sleep()

    def _do_wake(self) -> None:
        self.core.control.wake()

    def _do_reset(self) -> None:
        is_reset = self.core.reset_prefix_cache()
        self.log.add("reset", is_reset)
        if is_reset:
            self._check_forgotten()

    def _check_forgotten(self) -> None:
        """Nothing is found any more, nor would be at the next start: but what live requests own."""
        left = [block for block in self.core.cache.tree if block.copies]
        kept = self.core.cache.tails.kept
        stored = [r.key for r in self.contents.store if r is not None and r.key not in kept]
        if left or stored:
            raise InvariantError(f"{len(left)} blocks and {len(stored)} records were not forgotten")

    def _do_restart(self, is_clean: bool) -> None:
        """A new engine over what the persistent tier holds."""
        if is_clean:
            self.core.close()
        self._answers.cut()
        self._counts += self._of_engine()
        loss = 0.0 if is_clean else self._rng.choice([0.0, 0.1, 0.5])
        stored = self.contents.restart(self._rng, loss)
        self.log.add("stored", len(stored))
        self._world = self._start(stored)

    # ------------------------------------------------------------------ pins and transfers

    def _call(self, name: str, *args: Any, **values: Any) -> Any:
        """A call that may be refused, for reasons that it gives."""
        try:
            return getattr(self.core.control, name)(*args, **values)
        except RequestError as error:
            self.log.add("refused", name, type(error).__name__)
            return None

    def _named(self, tenant: str, family: int, length: int, session: str | None) -> dict[str, Any]:
        whose = {"tenant": tenant, "salt": tenant}
        if session is not None:
            return {**whose, "session_id": session}
        return {**whose, "token_ids": PREFIXES[family][:length]}

    def _do_pin(self, ttl: float | None, **whose: Any) -> None:
        if self._call("pin", **self._named(**whose), ttl=ttl) is not None:
            self._counts["pinned"] += 1

    def _do_unpin(self, ttl: float | None, **whose: Any) -> None:
        self._call("unpin", **self._named(**whose))

    def _do_ttl(self, ttl: float | None, **whose: Any) -> None:
        self._call("ttl", **self._named(**whose), ttl=ttl)

    def _do_export(self, tenant: str, session: str) -> None:
        found = self._call("session_keys", tenant, session)
        self._exported = []
        for key in found[1] if found is not None else []:
            block = self.core.control.export_block(key)
            if not block:
                break
            self._exported.append((found[0], [key, *block]))

    def _do_import(self) -> None:
        for salt, (key, *block) in self._exported:
            answer = self._call("import_block", salt, key, *block)
            self.log.add("import", answer)
            self._counts["imported"] += answer == "taken"
            self.core.check()

    # ------------------------------------------------------------------ the end

    def _finish(self) -> None:
        self.log.add("op", "finish")
        self.core.control.wake()
        self._drain()
        self._answers.check_ends()
        self._settle()
        self._check_idle()
        self._faults.weather = Weather()
        if not self.core.reset_prefix_cache():
            raise InvariantError("an idle engine cannot forget")
        self._check_forgotten()
        self._check_empty()

    def _drain(self) -> None:
        """Until all is answered; without news for long, that will not happen any more."""
        news, since_s, num_steps = -1, self._clock.now(), 0
        while self.core.has_work:
            if self._answers.num_news > news:
                news, since_s, num_steps = self._answers.num_news, self._clock.now(), 0
            waited_s = self._clock.now() - since_s
            if num_steps > _PATIENCE_STEPS or (waited_s > _PATIENCE_S and num_steps > _IDLE_STEPS):
                live = list(self.core.scheduler.requests)
                raise InvariantError(f"no news for {num_steps} steps, {waited_s:.1f} s: {live}")
            num_steps += 1
            self._step()

    def _settle(self) -> None:
        start_s = self._clock.now()
        while self.core.cache.has_background_work:
            self.core.work_in_background()
            self._check()
            self._let_time_pass()
            if self._clock.now() - start_s > _PATIENCE_S:
                pending = self.core.control.pending()
                raise InvariantError(f"after {_PATIENCE_S} s there still are {pending}")

    def _check_idle(self) -> None:
        """Nobody is there, so nobody holds anything."""
        core, cache = self.core, self.core.cache
        holding = {
            "requests": len(core.scheduler.requests),
            "sequences": len(core.scheduler.holders) + len(core.scheduler.waiting),
            "tails": len(cache.tails.blocks),
            "pins": sum(block.pins for block in cache.tree),
            "pool blocks": cache.num_blocks - cache.num_available,
        }
        if cache.moves is not None:
            holding["tickets"] = len(cache.moves.tickets) + len(cache.moves.loads)
            holding["bytes in flight"] = sum(cache.moves.in_flight_bytes.values())
            holding["stalled loads"] = sum(cache.moves.stalled.values())
        if any(holding.values()):
            raise InvariantError(f"an idle engine holds {holding}")

    def _check_empty(self) -> None:
        for tier in self.core.cache.residency.tiers.values():
            if tier.num_empty < tier.capacity:
                raise InvariantError(
                    f"{tier.name.value}: {tier.num_empty} of {tier.capacity} empty"
                )
