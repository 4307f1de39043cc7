"""What do tiers cost where nothing can be reused?

16 mixed requests (prompts of 32-512 tokens, outputs of 16-128, 8 at once) whose prompts have not
even the first token in common, on one tier and with a CPU and an NVMe tier below the pool, which
get every block for nothing. In the roomy pool all blocks of a run have room, and each run starts
from empty tiers. In the tight one, and in the tiers below it, everything is full before the
measured runs begin, so that each new block evicts another one in every tier.

The two engines take turns every few steps, and of each turn the fastest of all runs counts: on a
machine that others use too, whole runs differ by more than what is measured here. The losses of
whole runs are in the result beside it.

    python benchmarks/overhead.py [--quick] [--repeats 5] [--model llama-150m] [--folder DIR]
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from common.machine import Load, wait_for_quiet
from common.models import FIRST_TOKEN, LAST_TOKEN, cache_dir, model_dir, slot_bytes
from common.runs import parse, parser, print_table, write
from common.workloads import Request, mixed, tokens

from tierkv import SamplingParams
from tierkv.config import EngineConfig
from tierkv.engine import build
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.model.loader import load_model
from tierkv.storage.root import STORE_BYTES

MOST_LOSS = 0.03
ONE_TIER, TIERS = "one tier", "cpu,nvme"
BLOCK_SIZE = 16
FILLING_RUNS = 3
STEPS_OF_TURN = 8
PAUSE_S = 0.05  # what a turn has begun to move arrives before the other one's turn


@dataclass(slots=True)
class Turn:
    """What one system did before the other one's turn."""

    seconds: float
    num_tokens: int


class System:
    """One engine, and requests of the same lengths for each run, with tokens of their own."""

    def __init__(self, core: EngineCore, shapes: list[Request], *, starts_empty: bool) -> None:
        self.core, self.shapes, self.starts_empty = core, shapes, starts_empty
        self._num_prompts = 0
        self._before: dict[str, Any] = {}

    def begin(self) -> None:
        """Queue the requests of one run."""
        if not self.core.flush(60.0) or (self.starts_empty and not self.core.reset_prefix_cache()):
            raise RuntimeError("the tiers did not come to rest")
        self._before = self.core.metrics()
        for shape in self.shapes:
            params = SamplingParams(temperature=0.0, max_tokens=shape.num_new, ignore_eos=True)
            prompt = self._new_prompt(len(shape.prompt))
            self.core.add_request(EngineRequest(str(self._num_prompts), prompt, params))

    def _new_prompt(self, length: int) -> list[int]:
        """No other prompt begins with its first token."""
        rng, first = random.Random(self._num_prompts), FIRST_TOKEN + self._num_prompts
        if first > LAST_TOKEN:
            raise RuntimeError("there are no more prompts that begin differently")
        self._num_prompts += 1
        return [first, *tokens(rng, length - 1)]

    def take_turn(self) -> Turn:
        computed = self.core.metrics()["computed_tokens"]
        start = time.perf_counter()
        for _ in range(STEPS_OF_TURN):
            if self.core.has_work:
                self.core.step()
        seconds = time.perf_counter() - start
        return Turn(seconds, self.core.metrics()["computed_tokens"] - computed)

    def end(self) -> dict[str, int]:
        """What the run evicted and moved.

        Raises:
            RuntimeError: it reused something, or computed something twice.
        """
        after = self.core.metrics()
        done = {
            name: after[name] - self._before.get(name, 0)
            for name in after
            if name in ("hit_tokens", "preemptions")
            or name.endswith("_evicted")
            or name.startswith("moved_bytes")
        }
        if done.pop("hit_tokens") or done.pop("preemptions"):
            raise RuntimeError("unequal work: a run hit cached tokens, or preempted")
        return done


@dataclass(slots=True)
class Race:
    """One run of all systems, in turns: the turns of each, and what it moved."""

    turns: dict[str, list[Turn]]
    moved: dict[str, dict[str, int]]
    others_cores: float

    def seconds(self, name: str) -> float:
        return sum(turn.seconds for turn in self.turns[name])

    @property
    def loss(self) -> float:
        return 1 - self.seconds(ONE_TIER) / self.seconds(TIERS)


def race(systems: dict[str, System]) -> Race:
    """Run all systems once."""
    gc.collect()
    turns: dict[str, list[Turn]] = {name: [] for name in systems}
    for system in systems.values():
        system.begin()
    load, names = Load.now(), list(systems)
    while any(system.core.has_work for system in systems.values()):
        for name in names:
            turns[name].append(systems[name].take_turn())
            time.sleep(PAUSE_S)
        names.reverse()
    others = round(load.others(), 2)
    return Race(turns, {name: system.end() for name, system in systems.items()}, others)


def loss_of_fastest_turns(races: list[Race]) -> float | None:
    """Of the sums over all turns, each as fast as in its fastest run; what disturbs a run makes
    it slower, never faster. None where the engines' turns did not always compute as much."""
    work = {tuple(turn.num_tokens for turn in turns) for r in races for turns in r.turns.values()}
    if len(work) != 1:
        return None
    one, both = (
        [list(column) for column in zip(*(r.turns[name] for r in races), strict=True)]
        for name in (ONE_TIER, TIERS)
    )
    return 1 - sum(map(_fastest, one)) / sum(map(_fastest, both))


def _fastest(same: list[Turn]) -> float:
    return min(turn.seconds for turn in same)


def compare(systems: dict[str, System], args: argparse.Namespace) -> dict[str, Any]:
    """All runs of the systems of one pool."""
    for _ in range(1 if systems[TIERS].starts_empty else FILLING_RUNS):
        race(systems)
    races = []
    for _ in range(args.repeats):
        wait_for_quiet(args.quiet_s)
        races.append(race(systems))
    median = statistics.median(r.loss for r in races)
    fastest = loss_of_fastest_turns(races)
    entry: dict[str, Any] = {
        "loss": round(fastest if fastest is not None else median, 4),
        "loss_median": round(median, 4),
        "losses": [round(r.loss, 4) for r in races],
        "others_cores": [r.others_cores for r in races],
    }
    num_tokens = sum(s.num_new for s in systems[TIERS].shapes)
    for name in systems:
        runs = [r.seconds(name) for r in races]
        entry[name] = {
            "tokens_per_s": round(num_tokens / statistics.median(runs), 1),
            "runs_s": [round(s, 4) for s in runs],
            **races[-1].moved[name],
        }
    return entry


def make_systems(
    model: str, shapes: list[Request], at_once: int, folder: Path
) -> dict[str, dict[str, System]]:
    """By pool, and by tiers; the engines of a pool serve the same requests.

    All engines share one model: where its weights lie in memory changes the speed by some per cent.
    """
    longest = max(len(s.prompt) + s.num_new for s in shapes)
    num_blocks = sum(-(-(len(s.prompt) + s.num_new) // BLOCK_SIZE) for s in shapes)
    tight = at_once * (longest // BLOCK_SIZE + 2)
    systems: dict[str, dict[str, System]] = {}
    loaded = load_model(config_of(model, at_once, longest, tight, None))
    with mock.patch.object(build, "load_model", lambda *_: loaded):
        for pool, size in (("roomy", num_blocks + tight), ("tight", tight)):
            systems[pool] = {}
            for name, store in ((ONE_TIER, None), (TIERS, folder / pool)):
                config = config_of(model, at_once, longest, size, store)
                core = EngineCore.from_config(config)
                systems[pool][name] = System(core, shapes, starts_empty=pool == "roomy")
    return systems


def config_of(
    model: str, at_once: int, longest: int, num_blocks: int, store: Path | None
) -> EngineConfig:
    """With `store`: a CPU tier as large as the pool, and an NVMe tier twice as large."""
    options: dict[str, Any] = {}
    if store is not None:
        size = num_blocks * slot_bytes(model)
        options["offload"] = f"cpu={size},nvme={2 * size + STORE_BYTES}"
        options["nvme_path"] = str(store)
    return EngineConfig(
        model=str(model_dir(model)),
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        num_gpu_blocks=num_blocks,
        max_num_seqs=at_once,
        max_model_len=longest + BLOCK_SIZE,
        **options,
    )


def show(pools: dict[str, Any]) -> None:
    rows: list[list[object]] = [
        [
            f"{pool} pool, {name}",
            entry[name]["tokens_per_s"],
            f"{entry['loss']:.1%}" if name == TIERS else "",
            f"{MOST_LOSS:.0%}" if name == TIERS else "",
        ]
        for pool, entry in pools.items()
        for name in (ONE_TIER, TIERS)
    ]
    print_table(["nothing to reuse", "tokens/s", "loss", "at most"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=5)
    options.add_argument("--model", default="llama-150m", help="shape of the model")
    options.add_argument("--folder", type=Path, default=cache_dir(), help="where the store goes")
    args = parse(options, argv)
    model = "tiny" if args.quick else args.model
    shapes = mixed(6, (8, 40), (2, 8)) if args.quick else mixed(16)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        systems = make_systems(model, shapes, 2 if args.quick else 8, Path(folder))
        pools = {pool: compare(by_tiers, args) for pool, by_tiers in systems.items()}
        for system in (s for by_tiers in systems.values() for s in by_tiers.values()):
            system.core.close()
    show(pools)
    result = {
        "model": model,
        "dtype": "bfloat16",
        "target_loss": MOST_LOSS,
        "generated_tokens": sum(s.num_new for s in shapes),
        "pools": pools,
    }
    return write(args.out, "overhead", result)


if __name__ == "__main__":
    main()
