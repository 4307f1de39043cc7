"""Engines that are killed at any moment: the next one starts warm and says nothing wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tier_victim import NUM_PROMPTS, READY, Life, config, serve
from tiny_models import save_model

from tierkv.cli.main import main
from tierkv.engine.core import EngineCore

SUPPORT = Path(__file__).parent.parent / "support"
LARGE, SMALL = "64MiB", "9MiB"  # all blocks fit; about a hundred do, and slots are used again
KILLED = "SIGKILL"


class Nursery:
    """A process that forks engines and kills them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SUPPORT / "tier_victim.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, life: Life) -> str:
        """How the life ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(life.to_json(), file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[int, list[int]]:
    """Answers of an engine with one tier that holds everything."""
    core = EngineCore.from_config(config(str(model), num_gpu_blocks=2000))
    return serve(core, list(range(NUM_PROMPTS)))


class Log:
    """What the engines of one store said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_read = 0

    def read(self) -> tuple[int, int, list[tuple[int, list[int]]]]:
        """Of the life that ended just now: whether it was ready, its tokens found in the store,
        and its answers."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        new, self._num_read = lines[self._num_read :], len(lines)
        entries = [json.loads(line) for line in new if line != READY]
        hits = max((entry[0] for entry in entries), default=0)
        return READY in new, hits, [(n, t) for _, answers in entries for n, t in answers]


@pytest.mark.parametrize("num_kills", [5, pytest.param(50, marks=pytest.mark.full)])
def test_killed_engines_come_back_warm(
    num_kills: int,
    nursery: Nursery,
    model: Path,
    expected: dict[int, list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, log = tmp_path / "store", Log(tmp_path / "log")
    rng = random.Random(num_kills)
    num_ready = num_answers = num_hits = 0

    def live(size: str, lives_s: float | None, from_fork: bool = False) -> str:
        nonlocal num_ready, num_answers, num_hits
        seed = rng.randrange(1 << 30)
        end = nursery.run(
            Life(str(model), str(store), str(log.path), size, seed, lives_s, from_fork)
        )
        is_ready, hits, answers = log.read()
        for number, tokens in answers:
            assert tokens == expected[number], f"prompt {number}, seed {seed}"
        num_ready, num_answers = num_ready + is_ready, num_answers + len(answers)
        num_hits += hits if num_ready > 1 else 0  # the first found nothing from before
        return end

    for number in range(num_kills):
        size = SMALL if number % 3 == 2 else LARGE
        from_fork = number % 5 == 3
        assert live(size, rng.uniform(0.1, 1.0 if from_fork else 0.6), from_fork) == KILLED
    assert live(LARGE, None) == "status 0"
    assert num_ready > num_kills // 2 and num_answers > NUM_PROMPTS
    assert num_hits > 0
    capsys.readouterr()
    assert main(["store", "verify", str(store)]) == 0, capsys.readouterr().out
    print(f"{num_kills} kills: {num_answers} answers, {num_hits} tokens found on disk")


def test_a_killed_engine_lost_only_what_was_under_way(
    nursery: Nursery, model: Path, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    """Killed when all had long gone down: the next engine computes next to nothing."""
    store, log = tmp_path / "store", Log(tmp_path / "log")
    lives = [
        Life(str(model), str(store), str(log.path), LARGE, 1, 1.5),
        Life(str(model), str(store), str(log.path), LARGE, 1, None),
    ]
    assert nursery.run(lives[0]) == KILLED
    _, _, before = log.read()
    assert nursery.run(lives[1]) == "status 0"
    is_ready, hits, after = log.read()
    assert is_ready and len({number for number, _ in before}) > NUM_PROMPTS // 2
    assert dict(after) == expected
    assert hits > 200
