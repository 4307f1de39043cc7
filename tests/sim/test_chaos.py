"""No seed breaks a law, equal seeds give equal runs, and bugs that are put in are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from tierkv.cache import check
from tierkv.cache.copies import Copies
from tierkv.cache.erasures import Erasures
from tierkv.cache.moves import Moves
from tierkv.cache.prefix_tree import PrefixTree
from tierkv.cache.shares import Share
from tierkv.engine.core import EngineCore
from tierkv.engine.scheduler import Scheduler
from tierkv.sim.chaos.scenario import draw
from tierkv.sim.chaos.seeds import Outcome, run_seed, shrink
from tierkv.sim.mover import SimMover
from tierkv.types import FinishReason, Move, MoveResult

NUM_SEEDS = int(os.environ.get("TIERKV_CHAOS_SEEDS", "500"))
NUM_OPS = 24

DIGESTS = """
import logging
from tierkv.sim.chaos.seeds import run_seed
logging.disable(logging.CRITICAL)
for seed in range(25):
    print(run_seed(seed, 30).digest)
"""

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [run_seed(seed, NUM_OPS) for seed in range(NUM_SEEDS)]


def test_no_seed_breaks_a_law(outcomes: list[Outcome]) -> None:
    failed = [
        f"{outcome.failure}\n    python benchmarks/chaos.py --seed {outcome.seed} "
        f"--steps {NUM_OPS} --verbose"
        for outcome in outcomes
        if outcome.failure
    ]
    assert not failed, "\n".join(failed)


def test_everything_has_happened(outcomes: list[Outcome]) -> None:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total += outcome.counts
    for name in (
        *("gpu->cpu", "gpu->nvme", "cpu->nvme", "cpu->gpu", "nvme->gpu"),
        *("lost", "corrupt", "io_error", "no_space", "late", "unavailable", "erasures failed"),
        *("swaps", "preemptions", "loads_chosen", "recomputes_chosen", "joined", "tails"),
        *("prefetched", "rescued", "hit_tokens", "imported", "strays joined", "pinned"),
        *("samples forked", "beams forked", "reset", "sleep", "restart", "abort", "stop"),
    ):
        assert total[name] > 0, f"no seed had {name}: {dict(total)}"


def test_equal_seeds_give_equal_runs_whatever_hashes_are() -> None:
    first, second = (_digests(hash_seed) for hash_seed in ("1", "2"))
    assert first == second
    assert len(set(first)) == 25


def _digests(hash_seed: str) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-P", "-c", DIGESTS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=Path.home()
    )
    return done.stdout.split()


# ---------------------------------------------------------------------- bugs that are put in


def results_before_bytes(patch: Patch) -> None:
    """Moves are reported, and committed, before their bytes have arrived."""
    begin, poll = SimMover.begin, SimMover.poll
    hasty: dict[SimMover, list[Move]] = {}

    def hasty_begin(self: SimMover, moves: list[Move]) -> None:
        begin(self, moves)
        hasty.setdefault(self, []).extend(moves)

    def hasty_poll(self: SimMover) -> list[MoveResult]:
        poll(self)
        return [MoveResult(move.ticket, None, 0.0) for move in hasty.pop(self, [])]

    patch.setattr(SimMover, "begin", hasty_begin)
    patch.setattr(SimMover, "poll", hasty_poll)
    patch.setattr(SimMover, "poll_released", lambda self: [])


def forgotten_unpin(patch: Patch) -> None:
    """The source of a copy on write stays pinned."""
    patch.setattr(Copies, "finish", lambda self, batch: batch.sources.clear())


def dropped_wake_up(patch: Patch) -> None:
    """Nobody tells a sequence that its blocks are there."""
    patch.setattr(Scheduler, "_start_loaded", lambda self: None)


def short_copy(patch: Patch) -> None:
    """A copy on write leaves out the last token."""
    add = Copies.add
    patch.setattr(Copies, "add", lambda self, a, b, count: add(self, a, b, count - 1))


def shared_salt(patch: Patch) -> None:
    """Tenants find each other's blocks."""
    root_key = PrefixTree.root_key
    patch.setattr(PrefixTree, "root_key", lambda self, salt: root_key(self, ""))


def half_an_erasure(patch: Patch) -> None:
    """Of what must be forgotten one slot is left out."""
    begin = Erasures.begin
    patch.setattr(Erasures, "begin", lambda self, slots: begin(self, slots[1:]))


def two_ends(patch: Patch) -> None:
    """Who is aborted is told so twice."""
    final = Scheduler.final_output

    def abort(self: EngineCore, request_ids: list[str]) -> None:
        for request_id in request_ids:
            for seq in self.scheduler.finish_request(request_id, FinishReason.ABORT):
                self._outbox += [final(self.scheduler, seq)] * 2

    patch.setattr(EngineCore, "abort", abort)


def no_quota(patch: Patch) -> None:
    """Tenants are never full."""
    patch.setattr(Share, "is_full", lambda self, tier: False)


def early_reuse(patch: Patch) -> None:
    """What is read by a move may leave the pool before the move has ended."""
    patch.setattr(Moves, "_hold", lambda self, block, tier: None)
    patch.setattr(Moves, "_let_go", lambda self, block, tier: None)
    patch.setattr(check, "_check_readers", lambda cache, blocks: None)


BUGS: list[tuple[Callable[[Patch], None], str]] = [
    (results_before_bytes, "wrong KV"),
    (forgotten_unpin, "pins miscounted"),
    (dropped_wake_up, "no news for"),
    (short_copy, "wrong KV"),
    (shared_salt, "wrong KV"),
    (half_an_erasure, "not forgotten"),
    (two_ends, "has ended, and goes on"),
    (no_quota, "too many in"),
    (early_reuse, "while it was read"),
]


@pytest.mark.parametrize(("plant", "found"), BUGS, ids=[plant.__name__ for plant, _ in BUGS])
def test_a_bug_is_found(plant: Callable[[Patch], None], found: str, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    failures = (run_seed(seed, NUM_OPS).failure for seed in range(60))
    first = next(filter(None, failures), "nothing")
    assert re.search(found, first), f"within 60 seeds {first} was found"


def test_a_history_that_fails_is_made_short(monkeypatch: Patch) -> None:
    short_copy(monkeypatch)
    seed = next(islice((s for s in range(60) if run_seed(s, NUM_OPS).failure), 1))
    whole, kept = draw(seed, NUM_OPS).ops, shrink(seed, NUM_OPS)
    assert len(kept) < len(whole) / 2
    assert "wrong KV" in run_seed(seed, NUM_OPS, keep=kept).failure
    for number in kept:  # nothing more can be left out
        fewer = [other for other in kept if other != number]
        assert "wrong KV" not in run_seed(seed, NUM_OPS, keep=fewer).failure
