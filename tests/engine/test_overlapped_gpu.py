"""The whole engine on a simulated GPU: forwards, draws and copies are done as late, in as mixed an
order and in as small pieces as streams and events allow, while steps are overlapped.

A position of the pool holds, as 8 bytes, the token history up to it. A forward verifies when it
runs, not when it is launched, that every position it reads holds its own sequence's history; so a
slot that is given to another block too early, or a copy that does not wait for the forward that
wrote, shows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import FakeEvent, FakeGpu
from ledger import VOCAB, expected_tokens, history, next_token, step
from mover_worlds import LARGE, SMALL

from tierkv.cache.cuda.mover import CudaMover
from tierkv.cache.layout import KVLayout
from tierkv.cache.lower_tiers import MoveLimits
from tierkv.cache.pools import GpuPool
from tierkv.config import EngineConfig
from tierkv.engine.core import (
    EngineCore,
    EngineInfo,
    EngineRequest,
    LowerTierSetup,
    MonotonicClock,
)
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.policy_options import lower_specs
from tierkv.engine.sampling_params import SamplingParams
from tierkv.storage.arena import HostArena
from tierkv.storage.mem_store import MemStore
from tierkv.types import BlockCopy, RowResult, SampledToken, TierName

BLOCK = 4
LAYOUT = KVLayout(1, 1, 2, BLOCK, "float16")  # K and V of a position: 8 bytes
NUM_BLOCKS, NUM_ARENA, NUM_STORE = 34, 60, 200

CROWDED: dict[str, Any] = {
    "max_num_seqs": 3,
    "load_policy": "load",
    "oversubscribe": False,
    "async_scheduling": True,
}
"""Few seats: whoever ends makes room for one that is loaded into its slots, while its last row is
still to run."""


@dataclass(slots=True)
class Row:
    """What a kernel is given of a plan's row when it is launched."""

    seq_id: int
    index: int
    start: int
    num_tokens: int
    num_samples: int
    known: list[int]
    table: list[int]
    state: int = 0

    @classmethod
    def of(cls, row: PlanRow) -> Row:
        seq, end = row.seq, row.start + row.num_tokens
        known = seq.token_ids[:end]
        assert len(known) >= end - 1
        shape = row.start, row.num_tokens, row.num_samples
        return cls(seq.seq_id, seq.index, *shape, known, list(seq.block_table))


@dataclass(slots=True)
class Late:
    """What a step drew, once the GPU has come to it."""

    gpu: FakeGpu
    gate: FakeEvent
    drawn: list[list[int]] = field(default_factory=list)
    event: FakeEvent | None = None

    def results(self) -> list[RowResult]:
        assert self.event is not None
        time.sleep(0.001)  # copies that do not wait are done first
        self.gpu.open(self.gate)
        self.gpu.synchronize(self.event)
        return [RowResult([SampledToken(t) for t in tokens]) for tokens in self.drawn]


class GpuLedger:
    """Executor and sampler whose kernels are launched on the simulated GPU. It is so slow that a
    forward begins when somebody asks for its tokens.

    Attributes:
        wrong: what kernels found.
        num_late: tokens that the host did not know when a forward was launched.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.pool = gpu, GpuPool(LAYOUT, NUM_BLOCKS, "cpu")
        self.pool.tensor.view(torch.uint8).random_()
        gpu.adopt(self.pool.tensor)
        self._cells: Any = self.pool.tensor.view(NUM_BLOCKS, -1).view(torch.int64).numpy()
        self._last: dict[int, int] = {}  # written and read by kernels only
        self.wrong: list[str] = []
        self.num_late = 0
        self._gate = FakeEvent()

    def run(self, plan: Plan) -> list[Row]:
        rows, copies = [Row.of(row) for row in plan.rows], list(plan.copies)
        self.num_late += sum(len(row.known) < row.start + row.num_tokens for row in rows)
        self._gate = self.gpu.shut(self.gpu.compute)
        self.gpu.launch(lambda: self._forward(rows, copies))
        return rows

    def _forward(self, rows: list[Row], copies: list[BlockCopy]) -> None:
        for copy in copies:
            source = self._cells[copy.source, : copy.num_tokens]
            self._cells[copy.destination, : copy.num_tokens] = source
        for row in rows:
            tokens = list(row.known)
            if len(tokens) < row.start + row.num_tokens:
                tokens.append(self._last[row.seq_id])
            row.state = history(tokens[: row.start])
            for position in range(row.start, len(tokens)):
                row.state = step(row.state, tokens[position])
                self._cells[row.table[position // BLOCK], position % BLOCK] = row.state
            self._verify(row, tokens)

    def _verify(self, row: Row, tokens: list[int]) -> None:
        states = np.empty(len(tokens), np.int64)
        state = history([])
        for position, token in enumerate(tokens):
            states[position] = state = step(state, token)
        found = self._cells[row.table[: -(-len(tokens) // BLOCK)]].reshape(-1)[: len(tokens)]
        if not np.array_equal(found, states):
            at = int(np.flatnonzero(found != states)[0])
            self.wrong.append(f"sequence {row.seq_id} reads wrong KV at position {at}")

    def draw(self, logits: list[Row], plan: Plan) -> Late:
        late = Late(self.gpu, self._gate)
        self.gpu.launch(lambda: self._draw(logits, late))
        late.event = self.gpu.record(self.gpu.compute)
        return late

    def _draw(self, rows: list[Row], late: Late) -> None:
        for row in rows:
            tokens = [next_token(row.state, row.index + i) for i in range(row.num_samples)]
            if tokens:
                self._last[row.seq_id] = tokens[0]
            late.drawn.append(tokens)

    def forget(self, seq_id: int) -> None:
        """Kernels that were launched may still want it."""


def make_engine(rng: random.Random, gpu: FakeGpu, ledger: GpuLedger, **fixed: Any) -> EngineCore:
    """Over a CPU tier, and sometimes a store that forgets at the end; some options are fixed."""
    has_store = rng.random() < 0.5
    capacities = {TierName.CPU: NUM_ARENA, **({TierName.NVME: NUM_STORE} if has_store else {})}
    options = {
        "block_size": BLOCK,
        "offload": ",".join(tier.value for tier in capacities),
        "max_num_batched_tokens": rng.choice([8, 32]),
        "max_num_seqs": rng.choice([4, 16]),
        "preemption_mode": rng.choice(["swap", "recompute", "auto"]),
        "load_policy": rng.choice(["load", "split"]),
        "oversubscribe": rng.random() < 0.5,
        "time_slice": 2,
        "async_scheduling": rng.random() < 0.8,
    }
    config = EngineConfig.from_mapping({**options, **fixed})
    arena = HostArena(NUM_ARENA, LAYOUT.block_bytes)
    store = MemStore(NUM_STORE, LAYOUT.slot_bytes) if has_store else None
    mover = CudaMover(
        ledger.pool,
        arena,
        store,
        device=gpu,
        sizes=rng.choice([SMALL, LARGE]),
        staging_bytes=64 << 10,
        read_bytes=4 * LAYOUT.slot_bytes,
        copy_bytes=rng.choice([LAYOUT.slot_bytes, 8 * LAYOUT.slot_bytes]),
    )
    tiers = LowerTierSetup(
        specs=lower_specs(config, capacities),
        mover=mover,
        slot_bytes=LAYOUT.slot_bytes,
        limits=MoveLimits(load_timeout_s=60.0, room=0.3),
        cost=MeasuredCost(LAYOUT.slot_bytes),
        stored=[],
        close=mover.close,
    )
    info = EngineInfo("ledger", "", 10_000, VOCAB, [], NUM_BLOCKS, BLOCK, "float16", "cuda")
    return EngineCore(config, info, ledger, ledger, MonotonicClock(), tiers)


def play(core: EngineCore, rng: random.Random, most_between: int) -> None:
    """Conversations that come back and strangers, some of which stop early or are aborted; a new
    one after at most so many steps."""
    prefixes = [[rng.randrange(VOCAB) for _ in range(30)] for _ in range(4)]
    asked: dict[str, tuple[list[int], int, int, int | None]] = {}
    got: dict[tuple[str, int], list[int]] = {}
    aborted: set[str] = set()
    for number in range(30):
        prompt = rng.choice(prefixes)[: rng.randint(1, 30)]
        prompt = prompt + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        count, n, name = rng.randint(1, 50), rng.choice([1, 1, 1, 3]), str(number)
        stop = expected_tokens(prompt, count)[count // 2] if rng.random() < 0.4 else None
        params = SamplingParams(max_tokens=count, n=n, stop_token_ids=[stop] if stop else [])
        core.add_request(EngineRequest(name, prompt, params))
        asked[name] = prompt, count, n, stop
        for _ in range(rng.randint(0, most_between)):
            take(core, got)
        if rng.random() < 0.15 and (live := list(core.scheduler.requests)):
            aborted.add(rng.choice(live))
            core.abort([*aborted])
    while core.has_work:
        take(core, got)
    for name in asked.keys() - aborted:
        prompt, count, n, stop = asked[name]
        for index in range(n):
            expected = expected_tokens(prompt, count, index)
            if stop and stop in expected:
                expected = expected[: expected.index(stop) + 1]
            assert got[name, index] == expected


def take(core: EngineCore, got: dict[tuple[str, int], list[int]]) -> None:
    for output in core.step():
        got.setdefault((output.request_id, output.index), []).extend(output.new_token_ids)
    core.check()


@dataclass(slots=True)
class Outcome:
    """What came of one history."""

    wrong: list[str]
    num_late: int
    metrics: dict[str, Any]


def run_history(seed: int, most_between: int = 4, **fixed: Any) -> Outcome:
    """Play one; right tokens or an AssertionError."""
    rng = random.Random(seed)
    gpu = FakeGpu(seed)
    ledger = GpuLedger(gpu)
    core = make_engine(rng, gpu, ledger, **fixed)
    try:
        play(core, rng, most_between)
        return Outcome(ledger.wrong, ledger.num_late, core.metrics())
    finally:
        core.close()
        gpu.close()


@pytest.fixture
def seeds() -> Iterator[int]:
    return iter(random.sample(range(1 << 30), 1000))


def test_every_forward_reads_its_own_sequence(seeds: Iterator[int]) -> None:
    num_late = num_up = num_swaps = 0
    for number in range(10):
        seed = next(seeds)
        outcome = run_history(seed, 0, **CROWDED) if number % 2 else run_history(seed)
        assert outcome.wrong == [], f"seed {seed}"
        num_late += outcome.num_late
        num_up += outcome.metrics["moved_bytes_cpu_gpu"]
        num_swaps += outcome.metrics["swaps"]
    assert num_late > 100 and num_up > 0 and num_swaps > 0


def test_without_waits_some_forward_reads_something_else(
    seeds: Iterator[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that do not wait for what was launched before they began."""
    monkeypatch.setattr(FakeGpu, "wait", lambda gpu, stream, event: None)
    for _ in range(60):
        try:
            if run_history(next(seeds), 0, **CROWDED).wrong:
                return
        except AssertionError:
            return
    pytest.fail("nothing went wrong")
