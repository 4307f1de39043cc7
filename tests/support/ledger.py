"""An executor without tensors that knows at every moment what each pool position must hold.

A position of the ledger holds the whole token history up to it (as a running hash), so reading a
sequence back through its block table tells whether every block is the right one. The next token
is a function of the history alone: any scheduler, pool size or policy must give the same tokens.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from tierkv.cache.lower_tiers import MoveLimits
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineInfo, LowerTierSetup
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.policy_options import lower_specs
from tierkv.types import GivenResults, Logprob, RowResult, SampledToken, TierName

VOCAB = 50
START = 17


def history(token_ids: list[int], start: int = START) -> int:
    """A hash of a token history."""
    for token in token_ids:
        start = step(start, token)
    return start


def step(state: int, token: int) -> int:
    return (state * 1_000_003 + token + 1) % (2**61 - 1)


def next_token(state: int, sample: int = 0) -> int:
    return (state // 7 + sample * 31) % VOCAB


class ManualClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class Ledger:
    """Executor and sampler in one; `logits` are the histories at the sampled rows."""

    def __init__(self, num_blocks: int, block_size: int, window: int | None = None) -> None:
        self.block_size = block_size
        self.window = window
        self.pool: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.num_copies = 0
        self.max_rows = 0
        self.computed: list[tuple[int, int, int]] = []
        self.forgotten: list[int] = []
        self._last_sample: dict[int, int] = {}

    def run(self, plan: Plan) -> list[int]:
        self.max_rows = max(self.max_rows, len(plan.rows))
        for copy in plan.copies:
            source, destination = self.pool[copy.source], self.pool[copy.destination]
            destination[: copy.num_tokens] = source[: copy.num_tokens]
            self.num_copies += 1
        return [self._run_row(row) for row in plan.rows]

    def _run_row(self, row: PlanRow) -> int:
        seq, table = row.seq, row.seq.block_table
        tokens = self._tokens(row)
        state = history(tokens[: row.start])
        for position in range(row.start, row.start + row.num_tokens):
            state = step(state, tokens[position])
            self.pool[table[position // self.block_size]][position % self.block_size] = state
        self._verify(row)
        self.computed.append((seq.seq_id, row.start, row.num_tokens))
        return state

    def _verify(self, row: PlanRow) -> None:
        """Every position that attention would read holds this sequence's own history."""
        first = 0 if self.window is None else max(0, row.start - self.window + 1)
        tokens = self._tokens(row)
        state = history(tokens[:first])
        for position in range(first, row.start + row.num_tokens):
            state = step(state, tokens[position])
            slot = row.seq.block_table[position // self.block_size]
            found = self.pool[slot][position % self.block_size]
            assert found == state, f"sequence {row.seq.seq_id}, position {position}: wrong KV"

    def _tokens(self, row: PlanRow) -> list[int]:
        """The row's tokens; one that is still in flight is known here, as on a device."""
        tokens = row.seq.token_ids
        if len(tokens) < row.start + row.num_tokens:
            return [*tokens, self._last_sample[row.seq.seq_id]]
        return tokens

    def draw(self, logits: list[int], plan: Plan) -> GivenResults:
        rows = [self._sample_row(s, row) for s, row in zip(logits, plan.rows, strict=True)]
        return GivenResults(rows)

    def _sample_row(self, state: int, row: PlanRow) -> RowResult:
        tokens = [next_token(state, row.seq.index + i) for i in range(row.num_samples)]
        if tokens:
            self._last_sample[row.seq.seq_id] = tokens[0]
        best = {next_token(state, i): Logprob(-float(i), i + 1) for i in range(4)}
        samples = [SampledToken(t, best if row.seq.request.is_stepped else None) for t in tokens]
        return RowResult(samples)

    def forget(self, seq_id: int) -> None:
        self.forgotten.append(seq_id)


class LedgerPort:
    """A `BlockPort`: a position is 8 bytes of its history.

    Attributes:
        num_given_back: how often the pool was emptied.
    """

    def __init__(self, ledger: Ledger, mover: Any) -> None:
        self._ledger, self._mover = ledger, mover
        self.num_given_back = 0

    def read(self, tier: TierName, slot: int, key: bytes) -> Future[bytes | None]:
        rows = self._ledger.pool if tier is TierName.GPU else self._mover.tiers[tier]
        found: Future[bytes | None] = Future()
        found.set_result(b"".join((state or 0).to_bytes(8, "big") for state in rows[slot]))
        return found

    def write(self, slot: int, payload: bytes) -> None:
        states = [int.from_bytes(payload[i : i + 8], "big") for i in range(0, len(payload), 8)]
        self._ledger.pool[slot][:] = states

    def give_back(self) -> int:
        self.num_given_back += 1
        for row in self._ledger.pool:
            row[:] = [None] * len(row)
        return 8 * self._ledger.block_size * len(self._ledger.pool)


def ledger_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 10_000,
    window: int | None = None,
    cpu_blocks: int = 0,
    nvme_blocks: int = 0,
    mover: dict[str, object] | None = None,
    limits: MoveLimits | None = None,
    **options: object,
) -> tuple[EngineCore, Ledger, ManualClock]:
    """A real engine core over a ledger; with lower tiers when they have blocks."""
    ledger, clock = Ledger(num_blocks, block_size, window), ManualClock()
    capacities = {TierName.CPU: cpu_blocks, TierName.NVME: nvme_blocks}
    capacities = {name: count for name, count in capacities.items() if count}
    if capacities:
        options["offload"] = ",".join(name.value for name in capacities)
    config = EngineConfig.from_mapping({"block_size": block_size, **options})
    tiers = _lower_tiers(config, capacities, ledger, clock, mover or {}, limits)
    port = LedgerPort(ledger, tiers.mover if tiers is not None else None)
    info = EngineInfo(
        model="ledger",
        tokenizer="",
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        eos_token_ids=[],
        num_gpu_blocks=num_blocks,
        block_size=block_size,
        dtype="float32",
        device="cpu",
        window=window,
        layout="ledger",
        block_bytes=8 * block_size,
    )
    return EngineCore(config, info, ledger, ledger, clock, tiers, port=port), ledger, clock


def _lower_tiers(
    config: EngineConfig,
    capacities: dict[TierName, int],
    ledger: Ledger,
    clock: ManualClock,
    mover: dict[str, object],
    limits: MoveLimits | None,
) -> LowerTierSetup | None:
    from ledger_mover import LedgerMover

    if not capacities:
        return None
    return LowerTierSetup(
        specs=lower_specs(config, capacities),
        mover=LedgerMover(ledger, capacities, clock, **mover),  # type: ignore[arg-type]
        slot_bytes=1,
        limits=limits or MoveLimits(load_timeout_s=config.load_timeout),
        cost=MeasuredCost(1),
        stored=[],
        close=lambda: None,
    )


def expected_tokens(prompt: list[int], count: int, index: int = 0) -> list[int]:
    """What sample `index` of a request must generate, whatever happens around it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(history(tokens), index))
    return tokens[len(prompt) :]
