"""What a window onto the engine shows: where blocks are, what moves, who runs and who waits.

A snapshot is made when somebody asks for one, between two steps, and costs nothing otherwise. What
it costs is bounded: the tiers are drawn as cells of many slots, holders are followed by what
changed, and where the blocks of waiting sequences lie is looked up for some of them at a time.
It holds ids and numbers, and nothing of what anyone wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from tierkv.cache.lookup import is_in_pool, lower_tier
from tierkv.cache.prefix_tree import Block
from tierkv.engine.cells import TierCells
from tierkv.engine.holders import Holders
from tierkv.engine.request import Request, SeqState, Sequence
from tierkv.engine.scheduler import Scheduler
from tierkv.types import TierName

ROW = (
    "request", "index", "state", "owner", "prompt_tokens", "cached_tokens", "computed_tokens",
    "generated_tokens", "max_tokens", "blocks", "gpu", "cpu", "nvme", "age_s", "preemptions",
)  # fmt: skip
"""What a sequence's row says, in order: `owner` is its number in the pool's `owners`, `blocks` how
many its tokens need, `gpu`, `cpu`, `nvme` how many of them lie there (in the hottest tier that has
them)."""

MOST_ROWS = 128
MOST_ENDED_ROWS = 8
MOST_LOOKS = 512  # at blocks, in one snapshot
MOST_SHOWN_BLOCKS = 4096  # of a request whose cells are asked for
_SAMPLE = 64  # of a sequence's blocks, to say where they lie
_HASHED_TOKENS = 8192  # a longer prompt is not hashed for the sake of a window

_Places = tuple[int, int, int]


class Observer:
    """Makes snapshots of one engine.

    Args:
        scheduler: of the engine, and with it its cache, its counters and its timeline.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._cache = scheduler.cache
        self._holders: Holders | None = None
        self._tiers: list[TierCells] = []
        self._places: dict[int, _Places] = {}
        self._turn = 0

    def snapshot(self) -> dict[str, Any]:
        """Everything at once, as plain values."""
        holders = self._prepare()
        holders.look(self._scheduler.holders)
        scheduler, moves = self._scheduler, self._cache.moves
        queue = list(scheduler.waiting)
        return {
            "t": scheduler.timeline.now(),
            "slot_bytes": moves.slot_bytes if moves is not None else 0,
            "tiers": [tier.snapshot() for tier in self._tiers],
            "links": self._links(),
            "counters": scheduler.metrics.as_dict(),
            "running": len(scheduler.running),
            "loading": len(scheduler.loading),
            "waiting": sum(seq.state is SeqState.WAITING for seq in queue),
            "swapped": sum(seq.state is not SeqState.WAITING for seq in queue),
            "rows": self._rows(queue, holders),
        }

    def request(self, request_id: str) -> dict[str, Any] | None:
        """What happened to a request, and the cells of each tier that hold its blocks.

        None when it is unknown, or forgotten.
        """
        timeline, live = self._scheduler.timeline, self._scheduler.requests.get(request_id)
        if live is None:
            ended = timeline.ended(request_id)
            return None if ended is None else ended | {"t": timeline.now(), "cells": {}}
        self._prepare()
        return timeline.describe(live) | {"t": timeline.now(), "cells": self._cells_of(live)}

    def _prepare(self) -> Holders:
        """Nothing is kept of the tiers until somebody looks."""
        if self._holders is None:
            self._holders = Holders(self._cache.num_blocks, self._cache.block_size)
            self._tiers = [
                TierCells(tier, self._holders if name is TierName.GPU else None)
                for name, tier in self._cache.residency.tiers.items()
            ]
        return self._holders

    def _links(self) -> list[list[Any]]:
        """Source, destination, moves, bytes and failures so far, and bytes in flight."""
        moves = self._cache.moves
        if moves is None:
            return []
        flying = moves.in_flight_bytes
        return [
            [*(tier.value for tier in link), s.num_moves, s.num_bytes, s.failures.total(),
             flying[link]]
            for link, s in moves.stats.items()
        ]  # fmt: skip

    # ------------------------------------------------------------------ sequences

    def _rows(self, queue: list[Sequence], holders: Holders) -> list[list[Any]]:
        scheduler = self._scheduler
        live = chain(scheduler.running.values(), scheduler.loading.values(), queue)
        shown = list(islice(live, MOST_ROWS))
        self._find_places(shown)
        now = scheduler.timeline.now()
        rows = [self._row(seq, holders.owner(seq), now) for seq in shown]
        return rows + [_ended_row(d) for d in scheduler.timeline.last_ended(MOST_ENDED_ROWS)]

    def _row(self, seq: Sequence, owner: int, now: float) -> list[Any]:
        request, places = seq.request, self._places.get(seq.seq_id)
        if places is None:
            places = (len(seq.block_table) - seq.num_released, 0, 0)
        return [
            request.request_id,
            seq.index,
            shown_state(seq),
            owner,
            seq.num_prompt_tokens,
            request.num_cached_tokens or 0,
            seq.num_computed,
            seq.num_generated,
            request.max_tokens,
            max(self._cache.blocks_for(_num_kept(seq)), sum(places)),
            *places,
            now - request.arrival_s,
            request.num_preemptions,
        ]

    def _find_places(self, shown: list[Sequence]) -> None:
        """Look up where blocks lie for as many sequences as the budget allows, in turns."""
        wanted = [seq for seq in shown if seq.num_loading or not seq.block_table]
        ids = {seq.seq_id for seq in wanted}
        self._places = {i: places for i, places in self._places.items() if i in ids}
        budget, can_hash = MOST_LOOKS, True
        for number in range(len(wanted)):
            if budget <= 0:
                self._turn += number
                return
            seq = wanted[(self._turn + number) % len(wanted)]
            if can_hash and not seq.blocks and not seq.block_keys:
                can_hash = False
                self._hash(seq)
            blocks = self._known_blocks(seq, _SAMPLE)
            self._places[seq.seq_id] = _places(blocks, _stride(seq, _SAMPLE))
            budget -= _SAMPLE

    def _hash(self, seq: Sequence) -> None:
        """Have the sequence's keys, which its admission needs anyway."""
        if len(seq.token_ids) <= _HASHED_TOKENS:
            self._cache.lookup(seq)

    def _known_blocks(self, seq: Sequence, most: int) -> Iterator[Block]:
        """Every n-th block that the sequence holds, or would find up to the first gap."""
        step = _stride(seq, most)
        if seq.blocks:
            yield from (block for block in seq.blocks[::step] if block is not None)
            return
        for key in seq.block_keys[::step]:
            block = self._cache.tree.get(key)
            if block is None:
                break
            yield block
        if seq.tail is not None:
            yield seq.tail

    def _cells_of(self, request: Request) -> dict[str, list[int]]:
        sizes = {tier.name: tier.slots_per_cell for tier in self._tiers}
        found: dict[str, set[int]] = {name: set() for name in sizes}
        live = [seq for seq in request.sequences if seq.state is not SeqState.FINISHED]
        for seq in live:
            for block in self._known_blocks(seq, max(1, MOST_SHOWN_BLOCKS // len(live))):
                for tier, copy in block.copies.items():
                    found[tier.value].add(copy.slot // sizes[tier.value])
        return {name: sorted(cells) for name, cells in found.items()}


def shown_state(seq: Sequence) -> str:
    """A sequence's state in the words of a window."""
    if seq.state is SeqState.RUNNING:
        return "decode" if seq.num_to_compute <= 1 and seq.num_generated else "prefill"
    if seq.state is SeqState.WAITING:
        return "preempted" if seq.num_generated or seq.request.num_preemptions else "queued"
    return str(seq.state.value)


def _ended_row(found: dict[str, Any]) -> list[Any]:
    generated = sum(found["generated_tokens"])
    age = found["ended_s"] - found["arrival_s"]
    prompt = found["prompt_tokens"]
    return [
        found["request"], 0, "finished", 0, prompt, found["cached_tokens"], prompt + generated,
        generated, found["max_tokens"], 0, 0, 0, 0, age, found["preemptions"],
    ]  # fmt: skip


def _num_kept(seq: Sequence) -> int:
    """Tokens whose KV is needed now; that of the last one generated not yet."""
    return seq.num_tokens - (1 if seq.num_generated else 0)


def _stride(seq: Sequence, most: int) -> int:
    return max(1, -(-max(len(seq.blocks), len(seq.block_keys)) // most))


def _places(blocks: Iterator[Block], step: int) -> _Places:
    """How many of the blocks lie in the pool, and below it; each stands for `step`."""
    gpu = cpu = nvme = 0
    for block in blocks:
        tier = TierName.GPU if is_in_pool(block) else lower_tier(block)
        gpu += step * (tier is TierName.GPU)
        cpu += step * (tier is TierName.CPU)
        nvme += step * (tier is TierName.NVME)
    return gpu, cpu, nvme
