"""Random histories of an engine over a ledger, and what must come out of them."""

from __future__ import annotations

import os
from collections import defaultdict

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from ledger import VOCAB, expected_tokens, ledger_engine

from tierkv.engine.core import EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import CapacityError

_PREFIXES = [[(7 * i + j) % VOCAB for j in range(60)] for i in range(3)]

requests = st.tuples(
    st.integers(0, 2),  # which prefix
    st.integers(0, 40),  # how much of it
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.integers(1, 12),  # max_tokens
    st.sampled_from([1, 1, 1, 2, 4]),  # n
    st.integers(0, 3),  # priority
)
operations = st.lists(
    st.one_of(
        requests,
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("abort"), st.integers(0, 5)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=40,
)
relaxed = settings(
    max_examples=int(os.environ.get("TIERKV_EXAMPLES", "120")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


class Run:
    """An engine, what it was asked, and what it answered so far."""

    def __init__(self, engine: dict[str, object]) -> None:
        self.core, self.ledger, self.clock = ledger_engine(**engine)  # type: ignore[arg-type]
        self.asked: dict[str, tuple[list[int], int, int, set[int]]] = {}
        self.aborted: set[str] = set()
        self.got: dict[tuple[str, int], list[int]] = defaultdict(list)

    def add(self, operation: tuple[int, int, list[int], int, int, int]) -> None:
        which, length, suffix, max_tokens, n, priority = operation
        prompt, name = _PREFIXES[which][:length] + suffix, f"r{len(self.asked)}"
        stops = self._stops(prompt, max_tokens)
        params = SamplingParams(max_tokens=max_tokens, n=n, stop_token_ids=sorted(stops))
        try:
            self.core.add_request(EngineRequest(name, prompt, params, priority))
        except CapacityError:
            return
        self.asked[name] = (prompt, max_tokens, n, stops)

    def _stops(self, prompt: list[int], max_tokens: int) -> set[int]:
        """For a third of the requests a token that their first sample meets half-way."""
        if len(self.asked) % 3:
            return set()
        return {expected_tokens(prompt, max_tokens)[max_tokens // 2]}

    def step(self) -> None:
        self.clock.time += 1.0
        for output in self.core.step():
            self.got[output.request_id, output.index].extend(output.new_token_ids)
        self.core.check()

    def abort(self, which: int) -> None:
        live = list(self.core.scheduler.requests)
        if live:
            name = live[which % len(live)]
            self.aborted.add(name)
            self.core.abort([name])

    def play(self, history: list[tuple[object, ...]]) -> None:
        for operation in history:
            if operation[0] == "step":
                for _ in range(operation[1]):  # type: ignore[call-overload]
                    self.step()
            elif operation[0] == "abort":
                self.abort(operation[1])  # type: ignore[arg-type]
                self.core.check()
            elif operation[0] == "reset":
                self.core.reset_prefix_cache()
            else:
                self.add(operation)  # type: ignore[arg-type]

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work
        for name in self.asked.keys() - self.aborted:
            prompt, max_tokens, n, stops = self.asked[name]
            for index in range(n):
                expected = expected_tokens(prompt, max_tokens, index)
                end = next((i for i, t in enumerate(expected, 1) if t in stops), max_tokens)
                assert self.got[name, index] == expected[:end]
        assert self.core.flush(timeout_s=10.0)
        self.core.check()
        assert self.core.metrics()["gpu_blocks_used"] == 0
        assert self.core.reset_prefix_cache()
        assert self.core.metrics()["gpu_blocks_free"] == self.core.cache.num_blocks
        self.core.check()
