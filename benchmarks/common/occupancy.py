"""What reserved KV holds, sampled from a running engine after each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tierkv.cache.prefix_tree import Block
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineInfo, EngineRequest, MonotonicClock
from tierkv.engine.plan import Plan
from tierkv.engine.request import Sequence
from tierkv.engine.sampling_params import SamplingParams
from tierkv.types import GivenResults, RowResult, SampledToken


@dataclass(slots=True)
class Occupancy:
    """Token positions, summed over the steps of a run; divide two of them for a share.

    Attributes:
        held: positions that hold the KV of a live sequence's token; shared blocks count once.
        paged: positions of the blocks that live sequences hold.
        contiguous: tokens of all live sequences, each counted for itself: what an engine holds
            that gives every sequence its own contiguous range.
        reserve_max: positions such an engine reserves: `max_model_len` for each live sequence.
        reserve_final: positions it would reserve if it knew every output's length beforehand.
        num_steps, num_sequences: steps, and live sequences summed over them.
    """

    held: int = 0
    paged: int = 0
    contiguous: int = 0
    reserve_max: int = 0
    reserve_final: int = 0
    num_steps: int = 0
    num_sequences: int = 0

    def sample(self, core: EngineCore) -> None:
        """Add the present state of the engine."""
        running = [seq for seq in core.scheduler.running.values() if seq.block_table]
        filled = _filled(running, core.cache.block_size)
        self.held += sum(filled)
        self.paged += len(filled) * core.cache.block_size
        self.contiguous += sum(seq.num_computed for seq in running)
        self.reserve_max += len(running) * core.info.max_model_len
        self.reserve_final += sum(seq.num_prompt_tokens + seq.request.max_tokens for seq in running)
        self.num_steps += 1
        self.num_sequences += len(running)

    @property
    def paged_share(self) -> float:
        return self.held / self.paged

    @property
    def reserve_max_share(self) -> float:
        return self.contiguous / self.reserve_max

    @property
    def reserve_final_share(self) -> float:
        return self.contiguous / self.reserve_final


def _filled(running: Iterable[Sequence], block_size: int) -> list[int]:
    """For each block held by any of the sequences: how many of its positions hold KV."""
    blocks: dict[int, tuple[Block, int]] = {}
    for seq in running:
        for index, block in enumerate(seq.blocks):
            if block is not None:
                count = min(block_size, max(0, seq.num_computed - index * block_size))
                known = blocks.get(id(block), (block, 0))[1]
                blocks[id(block)] = (block, max(known, count))
    return [count for _, count in blocks.values()]


class TokenCounter:
    """Executor and sampler without tensors: real scheduler and cache, made-up tokens."""

    def __init__(self) -> None:
        self._next = 0

    def run(self, plan: Plan) -> None:
        return None

    def draw(self, logits: None, plan: Plan) -> GivenResults:
        return GivenResults([RowResult(list(self._tokens(row.num_samples))) for row in plan.rows])

    def _tokens(self, count: int) -> Iterator[SampledToken]:
        for _ in range(count):
            self._next = (self._next + 7919) % 30_000
            yield SampledToken(self._next)

    def forget(self, seq_id: int) -> None:
        pass


def engine_without_model(
    num_tokens: int, block_size: int, max_model_len: int, **options: object
) -> EngineCore:
    """The real scheduler and cache over a pool of `num_tokens` positions."""
    config = EngineConfig.from_mapping({"block_size": block_size, **options})
    info = EngineInfo(
        model="none",
        tokenizer="",
        max_model_len=max_model_len,
        vocab_size=32_000,
        eos_token_ids=[],
        num_gpu_blocks=num_tokens // block_size,
        block_size=block_size,
        dtype="bfloat16",
        device="cpu",
    )
    counter = TokenCounter()
    return EngineCore(config, info, counter, counter, MonotonicClock())


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives before step `step`."""

    step: int
    prompt: list[int]
    params: SamplingParams


def play(core: EngineCore, arrivals: Iterable[Arrival]) -> Occupancy:
    """Run all of them, sampling after each step."""
    occupancy = Occupancy()
    pending = sorted(arrivals, key=lambda a: a.step, reverse=True)
    step = 0
    while pending or core.has_work:
        while pending and pending[-1].step <= step:
            arrival = pending.pop()
            name = f"arrival-{len(pending)}"
            core.add_request(EngineRequest(name, arrival.prompt, arrival.params))
        if core.has_work:
            core.step()
            occupancy.sample(core)
        step += 1
    return occupancy
