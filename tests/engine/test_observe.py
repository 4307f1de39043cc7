"""Snapshots of an engine: they agree with a plain recount, change nothing, and stay small."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgpack
import numpy as np
from histories import Run, operations, relaxed
from hypothesis import given
from hypothesis import strategies as st
from ledger import VOCAB, ledger_engine

from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState, Tier
from tierkv.engine import cells
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.holders import SHARED, Holders
from tierkv.engine.observe import MOST_ENDED_ROWS, MOST_ROWS, ROW, Observer
from tierkv.engine.request import SeqState
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.timeline import MOST_ENDED, MOST_EVENTS
from tierkv.types import TierName

GPU = TierName.GPU
STATES = ("empty", "filling", "cached", "draining", "in_use")


def rows_of(snapshot: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row[0]: dict(zip(ROW, row, strict=True)) for row in snapshot["rows"]}


def tier_of(snapshot: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [tier for tier in snapshot["tiers"] if tier["name"] == name]
    return dict(found)


def request(name: str, num_tokens: int, max_tokens: int = 8, **params: Any) -> EngineRequest:
    first = sum(map(ord, name))
    prompt = [first % VOCAB, *((first // VOCAB + 3 * i) % VOCAB for i in range(1, num_tokens))]
    return EngineRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **params))


def slots_by_hand(core: EngineCore, tier: TierName) -> list[int]:
    """What each slot is, found by walking over every block."""
    cache = core.cache
    found = [cells.EMPTY] * cache.residency.tiers[tier].capacity
    blocks: dict[int, Block] = {id(block): block for block in [*cache.tree, *cache.tails.blocks]}
    complete, held = set(), set()
    for seq in core.scheduler.holders:
        for index, block in enumerate(seq.blocks):
            if block is not None:
                blocks[id(block)] = block
                held.add(id(block))
                if (index + 1) * cache.block_size <= seq.num_computed:
                    complete.add(id(block))
    for block in blocks.values():
        copy = block.copies.get(tier)
        if copy is None:
            continue
        assert isinstance(copy.state, CopyState)
        is_ready = copy.state is CopyState.READY or (
            copy.state is CopyState.FILLING and id(block) in complete
        )
        is_used = tier is GPU and id(block) in held and is_ready
        found[copy.slot] = cells.IN_USE if is_used else copy.state.code
    tickets = [] if cache.moves is None else cache.moves.tickets.values()
    late = [t for t in tickets if t.is_late and not t.is_released]
    for ticket in late:
        if ticket.move.destination is tier:
            found[ticket.copy.slot] = cells.FILLING
    return found


class WatchedRun(Run):
    """A history in which somebody looks after every step."""

    def __init__(self, engine: dict[str, object]) -> None:
        super().__init__(engine)
        self.observer = Observer(self.core.scheduler)

    def step(self) -> None:
        super().step()
        found = self.observer.snapshot()
        assert msgpack.unpackb(msgpack.packb(found), strict_map_key=False)
        for tier in found["tiers"]:
            self.check_tier(tier)
        self.check_rows(found)

    def check_tier(self, tier: dict[str, Any]) -> None:
        by_hand = slots_by_hand(self.core, TierName(tier["name"]))
        counts = Counter(by_hand)
        assert {name: tier[name] for name in STATES} == {
            name: counts[code] for code, name in enumerate(STATES)
        }
        assert tier["slots_per_cell"] == 1
        assert [cell & 7 for cell in tier["cells"]] == by_hand
        for cell in tier["cells"]:
            assert cell >> 4 == (cells.LEVELS if cell & 7 else 0)
            assert bool(cell & cells.BUSY) == (cell & 7 in (cells.FILLING, cells.DRAINING))

    def check_rows(self, found: dict[str, Any]) -> None:
        scheduler, (pool, *_) = self.core.scheduler, found["tiers"]
        owners = np.frombuffer(pool["owners"], "<u2")
        counts = Counter(slot for seq in scheduler.holders for slot in seq.block_table)
        live = [*scheduler.running.values(), *scheduler.loading.values(), *scheduler.waiting]
        shown = [row for row in found["rows"] if row[2] != "finished"]
        assert len(shown) == len(live)
        for seq, values in zip(live, shown, strict=True):
            row = dict(zip(ROW, values, strict=True))
            assert row["gpu"] + row["cpu"] + row["nvme"] <= row["blocks"]
            held = seq.block_table[seq.num_released :]
            own = {int(owners[s]) for s in held if counts[s] == 1}
            assert own <= {row["owner"], SHARED}
            assert (row["owner"] > 0) == (seq.state in (SeqState.RUNNING, SeqState.LOADING))
            described = self.observer.request(row["request"])
            assert described is not None
            held_cells = {(copy.slot) for b in seq.blocks if b for copy in b.copies.values()}
            assert held_cells <= set().union(*described["cells"].values())


engines = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(9, 40),
        "block_size": st.sampled_from([1, 2, 4]),
        "cpu_blocks": st.sampled_from([0, 3, 12, 60]),
        "nvme_blocks": st.sampled_from([0, 5, 40]),
        "window": st.sampled_from([None, None, None, 5]),
        "max_num_batched_tokens": st.sampled_from([4, 16, 64]),
        "max_num_seqs": st.sampled_from([4, 32]),
        "load_policy": st.sampled_from(["load", "split", "auto"]),
        "load_timeout": st.sampled_from([0.5, 100.0]),
        "time_slice": st.sampled_from([1, 3]),
        "oversubscribe": st.booleans(),
        "mover": st.fixed_dictionaries(
            {
                "seed": st.integers(0, 5),
                "failures": st.sampled_from([0.0, 0.3]),
                "is_eager": st.booleans(),
            }
        ),
    }
).map(lambda e: e if e["cpu_blocks"] or e["nvme_blocks"] else {**e, "oversubscribe": False})


@relaxed
@given(engines, operations)
def test_snapshots_agree_with_a_recount_and_change_nothing(
    engine: dict[str, object], history: list[tuple[object, ...]]
) -> None:
    run = WatchedRun(engine)
    run.play(history)
    run.finish()


def test_looking_now_and_then_sees_the_same() -> None:
    """What happened between two looks is made up for."""
    core, _, clock = ledger_engine(num_blocks=32, block_size=4, cpu_blocks=16)
    often, rarely = Observer(core.scheduler), Observer(core.scheduler)
    for number in range(24):
        core.add_request(request(f"{chr(97 + number)}", 10 + number % 7, n=1 + number % 3))
        for _ in range(2):
            clock.time += 1.0
            core.step()
            often.snapshot()
        if number % 5 == 4:
            a, b = often.snapshot(), rarely.snapshot()
            assert [t["cells"] for t in a["tiers"]] == [t["cells"] for t in b["tiers"]]
    core.abort(list(core.scheduler.requests))
    pool = tier_of(rarely.snapshot(), "gpu")
    assert pool["in_use"] == 0 and not any(pool["owners"])


def test_a_large_tier_is_drawn_as_a_thousand_cells() -> None:
    tier = Tier(GPU, 100_003)
    tier.slot_states[:40_000] = bytes([CopyState.READY.code]) * 40_000
    tier.counts[CopyState.READY] = 40_000
    tier.slot_states[70_000:70_098] = bytes([CopyState.FILLING.code]) * 98
    holders = Holders(tier.capacity, 16)
    holders.counts[:20_000] = 1
    holders.owners[:20_000] = 7
    drawn = cells.TierCells(tier, holders)
    found = drawn.snapshot()
    size = found["slots_per_cell"]
    assert len(found["cells"]) <= cells.MOST_CELLS and size * len(found["cells"]) >= 100_003
    assert found["in_use"] == found["cached"] == 20_000
    kinds = [cell & 7 for cell in found["cells"]]
    assert kinds[0] == cells.IN_USE and kinds[30_000 // size] == cells.CACHED
    assert kinds[50_000 // size] == cells.EMPTY
    filling = found["cells"][70_049 // size]
    assert filling & 7 == cells.FILLING and filling & cells.BUSY
    owners = np.frombuffer(found["owners"], "<u2")
    assert owners[0] == 7 and owners[30_000 // size] == 0


def test_a_cell_says_how_full_it_is() -> None:
    tier = Tier(GPU, cells.MOST_CELLS * 30)
    tier.slot_states[0:15] = bytes([CopyState.READY.code]) * 15
    tier.slot_states[30] = CopyState.DRAINING.code
    first, second, third = cells.TierCells(tier).snapshot()["cells"][:3]
    assert (first & 7, first >> 4, first & cells.BUSY) == (cells.CACHED, 8, 0)
    assert (second & 7, second >> 4) == (cells.DRAINING, 1) and second & cells.BUSY
    assert third == 0


def test_rows_are_bounded_and_name_the_last_that_ended() -> None:
    core, *_ = ledger_engine(num_blocks=64, max_num_seqs=8, enable_prefix_caching=False)
    for number in range(20):
        core.add_request(request(f"{chr(97 + number)}", 4, max_tokens=1))
    while core.has_work:
        core.step()
    for number in range(MOST_ROWS + 50):
        core.add_request(request(f"w{number}", 4))
    core.step()
    found = Observer(core.scheduler).snapshot()
    assert len(found["rows"]) == MOST_ROWS + MOST_ENDED_ROWS
    assert found["running"] == 8 and found["waiting"] == MOST_ROWS + 42
    ended = [row[0] for row in found["rows"] if row[2] == "finished"]
    assert ended == [chr(97 + n) for n in range(19, 19 - MOST_ENDED_ROWS, -1)]


def test_a_waiting_request_shows_where_its_blocks_lie() -> None:
    core, _, clock = ledger_engine(num_blocks=16, block_size=4, cpu_blocks=64, max_num_seqs=1)
    core.add_request(request("a", 20, max_tokens=1))
    while core.has_work:
        clock.time += 1.0
        core.step()
    core.flush(10.0)
    core.add_request(request("z", 32, max_tokens=30))  # takes the whole pool
    core.step()
    again = request("a", 20, max_tokens=1)
    again.request_id = "again"
    core.add_request(again)
    observer = Observer(core.scheduler)
    for _ in range(12):
        clock.time += 1.0
        core.step()
    rows = rows_of(observer.snapshot())
    assert rows["z"]["state"] == "decode" and rows["z"]["gpu"] == rows["z"]["blocks"]
    waiting = rows["again"]
    assert waiting["state"] == "queued" and waiting["owner"] == 0
    assert waiting["blocks"] == 5 and waiting["gpu"] + waiting["cpu"] == 5
    described = observer.request("again")
    assert described is not None and described["cells"]["cpu"]


# ---------------------------------------------------------------------- timelines


def kinds(events: list[list[Any]], index: int = 0) -> list[str]:
    return [event[2] for event in events if event[1] == index]


def test_a_timeline_says_when_it_was_queued_computed_and_ended() -> None:
    core, _, clock = ledger_engine(num_blocks=64, block_size=4, max_num_batched_tokens=8)
    core.add_request(request("a", 20, max_tokens=2))
    observer = Observer(core.scheduler)
    while core.has_work:
        clock.time += 1.0
        core.step()
    found = observer.request("a")
    assert found is not None and found["generated_tokens"] == [2]
    assert kinds(found["events"]) == ["queued", "running", "chunk", "chunk", "chunk", "finished"]
    assert [event[4:] for event in found["events"] if event[2] == "chunk"] == [
        (0, 8),
        (8, 8),
        (16, 4),
    ]
    assert found["events"][-1][3] == "length" and found["ended_s"] == clock.time
    assert found["first_token_s"] == 3.0


def test_a_timeline_shows_swaps_and_loads() -> None:
    core, _, clock = ledger_engine(
        num_blocks=8,
        block_size=2,
        cpu_blocks=64,
        oversubscribe=True,
        time_slice=3,
        preemption_mode="swap",
    )
    for name in "ab":
        core.add_request(request(name, 6, max_tokens=10))
    while core.has_work:
        clock.time += 1.0
        core.step()
    both = [Observer(core.scheduler).request(name) for name in "ab"]
    seen = [kind for found in both if found is not None for kind in kinds(found["events"])]
    assert {"queued", "running", "swapping", "swapped", "loading", "finished"} <= set(seen)


def test_a_preemption_by_recompute_is_named() -> None:
    core, _, clock = ledger_engine(num_blocks=8, block_size=2)
    for name in "ab":
        core.add_request(request(name, 4, max_tokens=10))
    while core.has_work:
        clock.time += 1.0
        core.step()
    found = Observer(core.scheduler).request("b")
    assert found is not None and found["preemptions"] > 0
    assert "preempted" in kinds(found["events"])


def test_each_sample_has_events_of_its_own() -> None:
    core, *_ = ledger_engine(num_blocks=64)
    core.add_request(request("a", 8, max_tokens=2, n=3))
    while core.has_work:
        core.step()
    found = Observer(core.scheduler).request("a")
    assert found is not None and found["num_sequences"] == 3
    assert [kinds(found["events"], index)[-1] for index in range(3)] == ["finished"] * 3


def test_timelines_are_bounded() -> None:
    core, *_ = ledger_engine(num_blocks=512, block_size=4, max_num_batched_tokens=2)
    core.add_request(request("long", 1900, max_tokens=1))
    while core.has_work:
        core.step()
    observer = Observer(core.scheduler)
    found = observer.request("long")
    assert found is not None and len(found["events"]) == MOST_EVENTS
    assert found["events"][-1][2] == "finished"
    for number in range(MOST_ENDED):
        core.add_request(request(f"r{number}", 2, max_tokens=1))
        while core.has_work:
            core.step()
    assert observer.request("long") is None and observer.request("r0") is not None
    assert observer.request("never there") is None


def test_nothing_that_anyone_wrote_is_in_a_snapshot() -> None:
    """A prompt of tokens that occur nowhere else, by value."""
    core, *_ = ledger_engine(num_blocks=64, cpu_blocks=64)
    core.add_request(EngineRequest("a", [37] * 41, SamplingParams(max_tokens=3)))
    core.step()
    observer = Observer(core.scheduler)
    for found in (observer.snapshot(), observer.request("a")):
        assert found is not None

        def lists(value: Any) -> list[list[Any]]:
            if isinstance(value, dict):
                return [x for v in value.values() for x in lists(v)]
            if isinstance(value, list | tuple):
                return [list(value), *(x for v in value for x in lists(v))]
            return []

        assert not any(found.count(37) > 4 for found in lists(found))
