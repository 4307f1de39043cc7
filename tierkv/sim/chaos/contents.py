"""What every slot of every tier holds, as symbols: whoever reads a block finds out whose it is.

    state of a token   (state before * 1,000,003 + token + 1) mod (2^61 - 1); the first follows its
                       salt's state
    row of a block     the states of its tokens, None where nothing right was ever written
    next token         a function of the state

A state stands for the whole history up to its token, so a position that holds the state it should
has the KV of the right sequence, and no scheduler, pool or fault can change what a request is
answered. `Contents` is the engine's executor, sampler and block port, and watches its mover.
"""

from __future__ import annotations

import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from random import Random

from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.request import Sequence
from tierkv.errors import InvariantError
from tierkv.sim.clock import VirtualClock
from tierkv.sim.mover import GPU, NVME
from tierkv.storage.base import StoredBlock
from tierkv.types import (
    BlockKey,
    GivenResults,
    Logprob,
    Move,
    MoveFailure,
    RowResult,
    SampledToken,
    TierName,
)

VOCAB = 50
STATE_BYTES = 8
NUM_CANDIDATES = 4
"""Tokens that a caller who chooses may choose from."""

TOKEN_BYTES = 4

Row = list[int | None]
_GONE = (MoveFailure.LOST, MoveFailure.CORRUPT)


def start_state(salt: str) -> int:
    """What comes before the first token of every sequence under a salt."""
    return 17 + zlib.crc32(salt.encode())


def next_state(state: int, token: int) -> int:
    return (state * 1_000_003 + token + 1) % (2**61 - 1)


def next_token(state: int, sample: int) -> int:
    """What sample number `sample` says after a history."""
    return (state // 7 + sample * 31) % VOCAB


def state_of(salt: str, tokens: list[int]) -> int:
    """What stands for a whole history."""
    state = start_state(salt)
    for token in tokens:
        state = next_state(state, token)
    return state


def answer(
    salt: str, prompt: list[int], max_tokens: int, sample: int, stop: frozenset[int]
) -> list[int]:
    """All that a sample of a request must generate, whatever happens around it."""
    state = state_of(salt, prompt)
    tokens: list[int] = []
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in stop):
        tokens.append(next_token(state, sample))
        state = next_state(state, tokens[-1])
    return tokens


@dataclass(slots=True, eq=False)
class Record:
    """What a slot of the persistent tier holds."""

    key: BlockKey
    parent: BlockKey
    tokens: bytes
    generation: int
    row: Row
    last_use: float


@dataclass(slots=True)
class _Write:
    """A write into the persistent tier that has not ended, and what was in the slot."""

    move: Move
    before: Record | None


@dataclass(slots=True, frozen=True)
class StepTime:
    """Seconds of a step: `fixed_s + per_token_s * tokens`."""

    fixed_s: float
    per_token_s: float


class Contents:
    """The bytes of all tiers.

    Args:
        clock: advanced by each step.
        block_size: tokens per block.
        blocks: slots of each tier.
        window: tokens that attention looks back, if not at all of them.
        time: of a step.

    Attributes:
        store: the persistent tier's slots.
    """

    def __init__(
        self,
        clock: VirtualClock,
        block_size: int,
        blocks: dict[TierName, int],
        window: int | None,
        time: StepTime,
    ) -> None:
        self.store: list[Record | None] = [None] * blocks.get(NVME, 0)
        self._clock, self._time = clock, time
        self._block_size, self._blocks, self._window = block_size, blocks, window
        self._rows = self._empty_rows()
        self._states: dict[int, list[int]] = {}
        self._reading: dict[int, Row] = {}
        self._staged: dict[int, Row] = {}
        self._writing: dict[int, _Write] = {}
        self._lost: set[tuple[TierName, int]] = set()
        self._generation = 0

    def _empty_rows(self) -> dict[TierName, list[Row]]:
        return {t: [self._nothing() for _ in range(n)] for t, n in self._blocks.items()}

    def _nothing(self) -> Row:
        return [None] * self._block_size

    # ------------------------------------------------------------------ executor and sampler

    def run(self, plan: Plan) -> list[int]:
        """Copy and compute; returns each row's last state."""
        pool = self._rows[GPU]
        for copy in plan.copies:
            pool[copy.destination][: copy.num_tokens] = pool[copy.source][: copy.num_tokens]
        states = [self._compute(row) for row in plan.rows]
        self._clock.advance(self._time.fixed_s + self._time.per_token_s * plan.num_tokens)
        return states

    def _compute(self, row: PlanRow) -> int:
        seq, size, pool = row.seq, self._block_size, self._rows[GPU]
        end = row.start + row.num_tokens
        states = self._states_of(seq, end)
        for position in range(row.start, end):
            pool[seq.block_table[position // size]][position % size] = states[position]
        first = 0 if self._window is None else max(0, row.start - self._window + 1)
        for start in range(first - first % size, end, size):
            begin, stop = max(first, start), min(start + size, end)
            found = pool[seq.block_table[start // size]][begin - start : stop - start]
            if found != states[begin:stop]:
                raise InvariantError(
                    f"sequence {seq.seq_id} reads wrong KV at tokens [{begin}, {stop}), "
                    f"slot {seq.block_table[start // size]}"
                )
        return states[end - 1]

    def _states_of(self, seq: Sequence, end: int) -> list[int]:
        """After each of the first `end` tokens, at least."""
        states = self._states.setdefault(seq.seq_id, [])
        state = states[-1] if states else start_state(seq.cache_salt)
        for token in seq.token_ids[len(states) :]:
            state = next_state(state, token)
            states.append(state)
        if len(states) < end:  # the last step's token, which the engine has not read
            states.append(next_state(state, next_token(state, seq.index)))
        return states

    def draw(self, logits: list[int], plan: Plan) -> GivenResults:
        """One result per row; an overlapped engine reads them a step later."""
        rows = [self._draw(state, row) for state, row in zip(logits, plan.rows, strict=True)]
        return GivenResults(rows)

    def _draw(self, state: int, row: PlanRow) -> RowResult:
        best = None
        if row.seq.request.is_stepped:
            best = {next_token(state, i): Logprob(-float(i), i + 1) for i in range(NUM_CANDIDATES)}
        first = row.seq.index if best is None else 0
        tokens = [next_token(state, first + i) for i in range(row.num_samples)]
        return RowResult([SampledToken(token, best) for token in tokens])

    def forget(self, seq_id: int) -> None:
        self._states.pop(seq_id, None)

    # ------------------------------------------------------------------ what the mover does

    def begun(self, move: Move) -> None:
        """Nothing that was in the destination may be relied on any more."""
        place = move.destination, move.destination_slot
        self._reading[move.ticket] = self._row_at(move.source, move.source_slot)
        self._lost.discard(place)
        if move.destination is NVME:
            self._writing[move.ticket] = _Write(move, self.store[move.destination_slot])
            self.store[move.destination_slot] = None
        else:
            self._rows[move.destination][move.destination_slot] = self._nothing()

    def staged(self, move: Move) -> None:
        self._staged[move.ticket] = self._read_source(move)

    def ended(self, move: Move, failure: MoveFailure | None) -> MoveFailure | None:
        """Let the bytes arrive, unless it failed or the source has lost them."""
        place = move.source, move.source_slot
        self._writing.pop(move.ticket, None)
        staged = self._staged.pop(move.ticket, None)
        if failure in _GONE:
            self._lose(*place)
        elif failure is None and staged is None and place in self._lost:
            failure = MoveFailure.LOST
        if failure is None:
            self._arrive(move, self._read_source(move) if staged is None else staged)
        self._reading.pop(move.ticket, None)
        return failure

    def _lose(self, tier: TierName, slot: int) -> None:
        self._lost.add((tier, slot))
        if tier is NVME:
            self.store[slot] = None
        else:
            self._rows[tier][slot] = self._nothing()

    def _row_at(self, tier: TierName, slot: int) -> Row:
        if tier is NVME:
            record = self.store[slot]
            return list(record.row) if record is not None else self._nothing()
        return list(self._rows[tier][slot])

    def _read_source(self, move: Move) -> Row:
        """The block, which nobody may have touched since the move began."""
        row = self._row_at(move.source, move.source_slot)
        if row != self._reading[move.ticket]:
            raise InvariantError(f"the source was written while it was read: {ends(move)}")
        if move.source is NVME:
            record = self.store[move.source_slot]
            if record is None or record.key != move.key:
                raise InvariantError(f"the source holds another block: {ends(move)}")
            record.last_use = self._clock.now()
        return row

    def _arrive(self, move: Move, row: Row) -> None:
        self._check_chain(move, row)
        slot = move.destination_slot
        if move.destination is not NVME:
            self._rows[move.destination][slot] = row
            return
        self.store[slot] = self._record(move, row)

    def _record(self, move: Move, row: Row) -> Record:
        self._generation += 1
        now = self._clock.now()
        return Record(move.key, move.parent, move.tokens, self._generation, row, now)

    def _check_chain(self, move: Move, row: Row) -> None:
        """A public block is whole: each of its states follows the one before."""
        tokens = tokens_of(move.tokens)
        for index in range(1, len(tokens)):
            before, state = row[index - 1], row[index]
            if before is None or state != next_state(before, tokens[index]):
                raise InvariantError(f"what arrives is not the block: {ends(move)}")

    # ------------------------------------------------------------------ erasing and restarts

    def erased(self, slot: int, record: Record | None) -> None:
        """What was in the slot when its erasure began is gone for good."""
        if self.store[slot] is record:
            self.store[slot] = None
        for write in self._writing.values():
            if write.before is record:
                write.before = None

    def restart(self, rng: Random, loss: float) -> list[StoredBlock]:
        """The machine died: memory is empty, writes in flight may or may not have happened, and a
        share of the persistent tier is lost. What is found then, in any order."""
        for write in self._writing.values():
            self.store[write.move.destination_slot] = rng.choice(self._outcomes(write))
        for slot in range(len(self.store)):
            if rng.random() < loss:
                self.store[slot] = None
        self._drop_duplicates()
        self._rows = self._empty_rows()
        self._states, self._reading, self._staged = {}, {}, {}
        self._writing, self._lost = {}, set()
        held = [(slot, record) for slot, record in enumerate(self.store) if record is not None]
        rng.shuffle(held)
        return [
            StoredBlock(slot, r.key, r.parent, r.tokens, r.generation, 1, r.last_use)
            for slot, r in held
        ]

    def _outcomes(self, write: _Write) -> list[Record | None]:
        """What the slot of a write that was cut off may hold."""
        row = self._reading[write.move.ticket]
        return [write.before, None, self._record(write.move, row)]

    def _drop_duplicates(self) -> None:
        """Of two slots with one key the one that was written last counts."""
        newest: dict[BlockKey, Record] = {}
        for record in filter(None, self.store):
            other = newest.get(record.key)
            if other is None or other.generation < record.generation:
                newest[record.key] = record
        self.store = [r if r is not None and newest[r.key] is r else None for r in self.store]

    # ------------------------------------------------------------------ the block port

    def read(self, tier: TierName, slot: int, key: BlockKey) -> Future[bytes | None]:
        found: Future[bytes | None] = Future()
        record = self.store[slot] if tier is NVME else None
        if (tier, slot) in self._lost or (tier is NVME and record is None):
            found.set_result(None)
            return found
        if record is not None and record.key != key:
            raise InvariantError(f"nvme slot {slot} holds another block than {key.hex()}")
        row = self._row_at(tier, slot)
        found.set_result(b"".join(_whole(s, tier, slot).to_bytes(STATE_BYTES, "big") for s in row))
        return found

    def write(self, slot: int, payload: bytes) -> None:
        parts = range(0, len(payload), STATE_BYTES)
        states = [int.from_bytes(payload[i : i + STATE_BYTES], "big") for i in parts]
        self._rows[GPU][slot] = [*states]

    def give_back(self) -> int:
        pool = self._rows[GPU]
        pool[:] = [self._nothing() for _ in pool]
        return STATE_BYTES * self._block_size * len(pool)


def ends(move: Move) -> str:
    """A move for people: its number, and from where to where."""
    source, destination = move.source.value, move.destination.value
    return f"{move.ticket} {source}:{move.source_slot} -> {destination}:{move.destination_slot}"


def tokens_of(packed: bytes) -> list[int]:
    """Token ids that were packed with 4 bytes each."""
    parts = range(0, len(packed), TOKEN_BYTES)
    return [int.from_bytes(packed[i : i + TOKEN_BYTES], "big") for i in parts]


def _whole(state: int | None, tier: TierName, slot: int) -> int:
    if state is None:
        raise InvariantError(f"{tier.value} slot {slot} is read, and holds nothing whole")
    return state
