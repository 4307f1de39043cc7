"""A real model over three real tiers: greedy tokens equal those of a pool that holds everything.

fp32, random weights. The mover is the real one with its threads; every move that succeeds is
compared byte for byte, and every law is checked after every step.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from checked_mover import CheckedMover
from fake_gpu import FakeGpu
from tiny_models import VOCAB_SIZE, save_model

import tierkv.engine.tiers as tiers
from tierkv.cache.cuda.mover import CudaMover
from tierkv.cache.link_mover import LinkMover
from tierkv.cache.mover import ThreadMover
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import DeviceError, EngineDeadError
from tierkv.types import TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
BLOCK_SIZE = 4
POOL_BLOCKS = 48

AXES: dict[str, list[str]] = {
    "preemption_mode": ["swap", "recompute", "auto"],
    "load_policy": ["load", "split", "auto", "recompute"],
    "eviction_policy": ["reuse", "gpu=lru,cpu=s3fifo,nvme=tinylfu", "gpu=sieve,cpu=arc,nvme=gdsf"],
    "admission_policy": ["write-through", "second-hit", "write-back"],
    "offload": ["cpu,nvme", "nvme", "cpu"],
}


def pairwise_settings() -> list[dict[str, str]]:
    """Settings in which every two values of different axes meet, greedily few."""
    names = list(AXES)
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(names, 2)
        for x in AXES[a]
        for y in AXES[b]
    }
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*AXES.values())]
    chosen = []
    while missing:
        best = max(every, key=lambda setting: len(missing & _pairs(setting)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(setting: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(setting.items(), 2)}


PAIRWISE = pairwise_settings()
FULL = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


class Workload:
    """Conversations that come back, with requests aborted at random moments.

    Attributes:
        prompts: the requests in order of arrival.
        arrivals: at which step each arrives.
        aborts: at which step which request is aborted.
    """

    def __init__(self, seed: int, count: int = 40) -> None:
        rng = random.Random(seed)
        openings = [[rng.randrange(VOCAB_SIZE) for _ in range(60)] for _ in range(4)]
        self.prompts: list[list[int]] = []
        for _ in range(count):
            opening = rng.choice(openings)[: rng.choice([24, 41, 60])]
            old = rng.choice(self.prompts) if self.prompts and rng.random() < 0.3 else opening
            self.prompts.append(
                old + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
            )
        self.arrivals = sorted(rng.randrange(120) for _ in range(count))
        self.aborts = {rng.randrange(count): rng.randrange(150) for _ in range(5)}
        self.params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def engine(model: Path, **options: Any) -> EngineCore:
    return EngineCore.from_config(
        EngineConfig(
            model=str(model),
            dtype="float32",
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=64,
            verify_model=False,
            num_threads=1,
            **options,
        )
    )


def play(core: EngineCore, work: Workload) -> list[list[int]]:
    """Every request's tokens; those of aborted ones as far as they came."""
    outputs: list[list[int]] = [[] for _ in work.prompts]
    step = 0
    while core.has_work or step <= max(work.arrivals):
        for number, at in enumerate(work.arrivals):
            if at == step:
                core.add_request(EngineRequest(str(number), work.prompts[number], work.params))
        core.abort([str(n) for n, at in work.aborts.items() if at == step])
        for output in core.step():
            outputs[int(output.request_id)].extend(output.new_token_ids)
        core.check()
        step += 1
    return outputs


def compare(found: list[list[int]], expected: list[list[int]]) -> None:
    """Equal, and an aborted request's tokens the beginning of what they would have been."""
    for number, (got, want) in enumerate(zip(found, expected, strict=True)):
        shared = min(len(got), len(want))
        assert got[:shared] == want[:shared], f"request {number}"


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[int, list[list[int]]]:
    """Tokens of the workloads by an engine whose pool holds everything."""
    found = {}
    for seed in range(3):
        work = Workload(seed)
        work.aborts = {}
        found[seed] = play(engine(model, num_gpu_blocks=2000), work)
    return found


def on_fake_gpu(pool: Any, arena: Any, store: Any) -> CudaMover:
    """The mover of a pool on a GPU, which copies some time later."""
    gpu = FakeGpu(random.randrange(1 << 32))
    gpu.adopt(pool.tensor)
    return CudaMover(pool, arena, store, device=gpu, piece_bytes=20 * 4096)


class Totals:
    """What happened in all storms of this module together."""

    counts: ClassVar[Counter[str]] = Counter()
    compared: ClassVar[Counter[tuple[TierName, TierName]]] = Counter()


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        *(pytest.param(s, ThreadMover, id=f"pairwise-{i}") for i, s in enumerate(PAIRWISE)),
        *(pytest.param(s, on_fake_gpu, id=f"gpu-{i}") for i, s in enumerate(PAIRWISE[:3])),
        *(
            pytest.param(s, ThreadMover, id=f"full-{i}", marks=pytest.mark.full)
            for i, s in enumerate(FULL)
        ),
        *(
            pytest.param(s, on_fake_gpu, id=f"full-gpu-{i}", marks=pytest.mark.full)
            for i, s in enumerate(FULL[::5])
        ),
    ],
)
def test_storm(
    setting: dict[str, str],
    make: Callable[..., LinkMover],
    model: Path,
    expected: dict[int, list[list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    movers: list[CheckedMover] = []

    def checked(pool: Any, arena: Any, store: Any) -> CheckedMover:
        movers.append(CheckedMover(make(pool, arena, store), pool, arena, store))
        return movers[-1]

    monkeypatch.setattr(tiers, "make_mover", checked)
    seed = sum(map(len, setting.values())) % 3
    core = engine(
        model,
        num_gpu_blocks=POOL_BLOCKS,
        cpu_cache_size=60 * 4096 * 2,
        nvme_cache_size="64MiB",
        nvme_path=str(tmp_path),
        oversubscribe=seed == 0,
        time_slice=4,
        **setting,
    )
    compare(play(core, Workload(seed)), expected[seed])
    metrics = core.metrics()
    core.close()
    assert metrics["gpu_blocks_used"] == 0 or metrics["moves_in_flight"] > 0
    for name in ("swaps", "preemptions", "loads_chosen", "recomputes_chosen", "resumed_tails"):
        Totals.counts[name] += metrics[name]
    Totals.compared.update(movers[0].compared)


def test_the_storms_used_every_way() -> None:
    """Runs last: moves in every direction were compared, and every decision was taken."""
    links = [(GPU, CPU), (GPU, NVME), (CPU, GPU), (NVME, GPU), (CPU, NVME)]
    assert all(Totals.compared[link] > 0 for link in links), Totals.compared
    assert all(count > 0 for count in Totals.counts.values()), Totals.counts


def test_a_gpu_that_fails_ends_the_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CudaMover] = []

    def make(*tiers: Any) -> CudaMover:
        made.append(on_fake_gpu(*tiers))
        return made[-1]

    monkeypatch.setattr(tiers, "make_mover", make)
    options = {"num_gpu_blocks": 200, "offload": "cpu,nvme=64MiB", "nvme_path": str(tmp_path)}
    core = engine(model, cpu_cache_size="1MiB", **options)
    params = SamplingParams(temperature=0, max_tokens=8)
    core.add_request(EngineRequest("a", list(range(80)), params))
    core.step()
    made[0]._device.fail("unspecified launch failure")
    with pytest.raises(DeviceError, match=r"unspecified launch failure.*restart the engine"):
        for _ in range(1000):
            core.step()
    with pytest.raises(EngineDeadError, match="unspecified launch failure"):
        core.step()
    core.close()


def test_a_restart_is_warm(model: Path, tmp_path: Path) -> None:
    """What one process computed another one finds on disk, and answers the same."""
    prompt = Workload(7).prompts[0] + list(range(100))
    options = {"num_gpu_blocks": 200, "offload": "nvme=64MiB", "nvme_path": str(tmp_path)}

    def answer(core: EngineCore) -> tuple[list[int], dict[str, Any]]:
        core.add_request(EngineRequest("a", prompt, SamplingParams(temperature=0, max_tokens=8)))
        tokens: list[int] = []
        while core.has_work:
            for output in core.step():
                tokens += output.new_token_ids
        metrics = core.metrics()
        core.close()
        return tokens, metrics

    cold, first = answer(engine(model, **options))
    warm, second = answer(engine(model, load_policy="load", **options))
    assert first["hit_tokens"] == 0
    assert second["hit_tokens_nvme"] >= len(prompt) - 2 * BLOCK_SIZE
    assert second["computed_tokens"] < first["computed_tokens"]
    assert warm == cold


def test_a_forgotten_prompt_stays_forgotten(model: Path, tmp_path: Path) -> None:
    """`reset_prefix_cache` reaches the disk too."""
    options = {"num_gpu_blocks": 200, "offload": "nvme=64MiB", "nvme_path": str(tmp_path)}
    params = SamplingParams(temperature=0, max_tokens=2)
    core = engine(model, **options)
    core.add_request(EngineRequest("a", list(range(80)), params))
    while core.has_work:
        core.step()
    assert core.reset_prefix_cache()
    core.close()
    core = engine(model, **options)
    core.add_request(EngineRequest("a", list(range(80)), params))
    while core.has_work:
        core.step()
    assert core.metrics()["hit_tokens"] == 0
    core.close()
