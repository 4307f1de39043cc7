"""Two processes share a model over gloo: greedy tokens equal those of one process.

fp32, random weights. Every law is checked after every step, as in test_tiers.py; a process of its
own runs the other half of each model, so engines here take seconds to start and are few.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_models import save_model

from tierkv.config import EngineConfig
from tierkv.engine.client import EngineClient
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tp.group import TpGroup
from tierkv.errors import ConfigError, EngineDeadError
from tierkv.storage.root import list_stores

pytest.importorskip("accelerate", reason="transformers shards weights with it")

VOCAB_SIZE = 212  # some releases of transformers divide it by the number of ranks
BLOCK_SIZE = 4
HEADER_BYTES = 4096
FAMILIES = [
    "mixtral",
    *(
        pytest.param(family, marks=pytest.mark.full)
        for family in ("qwen2-windowed", "qwen3", "gemma2", "phi3", "qwen3-moe", "olmo2", "glm4")
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose input and output embeddings are one."""
    options = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": True}
    return save_model("llama", tmp_path_factory.mktemp("llama"), **options)


@contextmanager
def engine(model: Path, size: int, **options: Any) -> Iterator[EngineCore]:
    fields = {"num_gpu_blocks": 40, "dtype": "float32", "num_threads": 1, **options}
    core = EngineCore.from_config(
        EngineConfig(
            model=str(model),
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=64,
            tensor_parallel_size=size,
            **fields,
        )
    )
    try:
        yield core
    finally:
        core.close()


def make_prompts(seed: int, count: int = 16) -> list[list[int]]:
    """Three openings that many share, 25 to 75 tokens."""
    rng = random.Random(seed)
    openings = [[rng.randrange(VOCAB_SIZE) for _ in range(55)] for _ in range(3)]
    return [
        rng.choice(openings)[: rng.choice([24, 41, 55])]
        + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
        for _ in range(count)
    ]


def run(core: EngineCore, prompts: list[list[int]], name: str = "r") -> list[list[int]]:
    """Greedy outputs of prompts that arrive two in each step."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    waiting = list(enumerate(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    while waiting or core.has_work:
        for number, prompt in waiting[:2]:
            core.add_request(EngineRequest(f"{name}{number}", prompt, params))
        del waiting[:2]
        for output in core.step():
            outputs[int(output.request_id.removeprefix(name))] += output.new_token_ids
        core.check()
    return outputs


def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(model, 1, num_gpu_blocks=2000) as core:
        return run(core, prompts)


def worker_of(core: EngineCore) -> subprocess.Popen[bytes]:
    assert isinstance(core.workers, TpGroup)
    (worker,) = core.workers.workers
    return worker.process


def until(happened: Callable[[], bool], limit_s: float = 60.0) -> bool:
    """Wait for something that is due; the limit only ends a test that has failed."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.01)
    return False


def has_ended(pid: int) -> bool:
    """No such process, or one that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_one_process(family: str, tmp_path: Path) -> None:
    model = save_model(family, tmp_path, vocab_size=VOCAB_SIZE)
    prompts = make_prompts(len(family))
    with engine(model, 1, num_gpu_blocks=2000) as core:
        wanted, fingerprint = run(core, prompts), core.info.fingerprint
        layout = core.info.layout
    with engine(model, 2) as core:
        assert run(core, prompts) == wanted
        assert core.metrics()["hit_tokens"] > 0
        assert (core.info.fingerprint, core.info.layout) == (fingerprint, layout)
        process = worker_of(core)
    assert process.returncode == 0
    assert not dist.is_initialized()


def damage(root: Path, taken: Path) -> int:
    """Flip a byte in every third block of the store that is not `taken`; returns how many."""
    (store,) = [sibling.path for sibling in list_stores(root) if sibling.path != taken]
    payload_bytes = int(store.name.split("-")[1])
    count = 0
    with (store / "blocks.data").open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, 3 * (HEADER_BYTES + payload_bytes)):
            file.seek(start + HEADER_BYTES + 100)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0xFF]))
            count += 1
    return count


@pytest.fixture
def tiers(tmp_path: Path) -> dict[str, Any]:
    return {
        "offload": "cpu=480KiB,nvme=64MiB",
        "nvme_path": str(tmp_path),
        "preemption_mode": "swap",
        "oversubscribe": True,
        "time_slice": 4,
        "load_policy": "load",
    }


def test_tiers_of_two_ranks(model: Path, tiers: dict[str, Any], tmp_path: Path) -> None:
    """Under pressure, after a restart with one rank's store damaged, with a worker killed."""
    prompts = make_prompts(1)
    wanted = expected(model, prompts)
    with engine(model, 2, **tiers) as core:
        assert run(core, prompts) == wanted
        metrics = core.metrics()
        assert core.cache.residency.tiers.keys() == {*core.cache.evictors}
        own = next(line for line in core.info.tiers if line.startswith("nvme"))
    for name in ("swaps", "moves_gpu_cpu", "moves_cpu_gpu"):
        assert metrics[name] > 0, name
    assert metrics["moves_gpu_nvme"] + metrics["moves_cpu_nvme"] > 0
    (taken,) = [s.path for s in list_stores(tmp_path) if str(s.path) in own]
    assert damage(tmp_path, taken) > 10
    with engine(model, 2, **tiers) as core:
        assert run(core, prompts) == wanted
        metrics = core.metrics()
        assert metrics["moves_nvme_gpu"] > 0, "it came back warm"
        assert metrics["move_failures_corrupt"] > 0, "and one rank's damage was a miss"
        check_killed_worker(core, prompts)


def check_killed_worker(core: EngineCore, prompts: list[list[int]]) -> None:
    process = worker_of(core)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        core.add_request(EngineRequest(f"killed{number}", prompt, params))
    core.step()
    process.kill()
    with pytest.raises(EngineDeadError, match=r"worker of rank 1 ended \(SIGKILL\)"):
        for _ in range(10_000):
            core.step()
    with pytest.raises(EngineDeadError, match="an earlier step failed"):
        core.step()
    core.close()
    assert process.returncode == -signal.SIGKILL


def test_a_second_engine_is_refused(model: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"tensor_parallel_size=2: torch.distributed is in"):
            EngineCore.from_config(EngineConfig(model=str(model), tensor_parallel_size=2))
    finally:
        dist.destroy_process_group()


def test_a_model_that_cannot_be_shared_leaves_no_process(tmp_path: Path) -> None:
    model = save_model("stablelm", tmp_path)
    with pytest.raises(ConfigError, match="no tensor-parallel plan"):
        EngineCore.from_config(EngineConfig(model=str(model), tensor_parallel_size=2))
    assert not dist.is_initialized()


@pytest.mark.full
def test_sessions_and_sleep(model: Path, tiers: dict[str, Any]) -> None:
    """What two ranks export one process takes in, and the other way round; a pool falls asleep."""
    (prompt,) = make_prompts(3, 1)
    wanted = expected(model, [prompt])
    options = {"num_gpu_blocks": 100, "load_policy": "load"}
    with engine(model, 2, **options) as core:
        run(core, [prompt], "first")
        blocks = exported(core, prompt)
    with engine(model, 1, **options) as core:
        take_in(core, blocks)
        assert run(core, [prompt]) == wanted
        assert core.metrics()["hit_tokens"] >= BLOCK_SIZE * len(blocks) > 0
        again = exported(core, prompt)
        assert [block[:3] for block in again][: len(blocks)] == [block[:3] for block in blocks]
    with engine(model, 2, **options | tiers) as core:
        take_in(core, again)
        assert run(core, [prompt]) == wanted
        assert core.metrics()["hit_tokens"] > 0
        core.control.sleep()
        assert until(lambda: falls_asleep(core))
        core.control.wake()
        assert run(core, [prompt], "woken") == wanted


def falls_asleep(core: EngineCore) -> bool:
    core.step()
    return bool(core.control.sleep_state()["state"] == "asleep")


def exported(core: EngineCore, prompt: list[int]) -> list[list[Any]]:
    """Key, parent, tokens and payload of a prompt's blocks."""
    found = []
    for key in core.control._keys_of("", prompt):
        answers: list[Any] = []

        def is_there(key: bytes = key, answers: list[Any] = answers) -> bool:
            core.step()
            answers[:] = core.control.export_block(key) or []
            return bool(answers)

        assert until(is_there)
        found.append([key, *answers])
    return found


def take_in(core: EngineCore, blocks: list[list[Any]]) -> None:
    for block in blocks:
        assert core.control.import_block("", *block) == "taken"


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_weights_are_the_same_on_all_ranks(model: Path, dtype: str) -> None:
    options = {"load_format": "dummy", "dtype": dtype}
    found = []
    for size in (1, 2):
        with engine(model, size, **options) as core:
            found.append((core.info.fingerprint, run(core, make_prompts(2, 3))))
    assert found[0][0] == found[1][0]
    assert dtype != "float32" or found[0][1] == found[1][1]


@pytest.mark.full
def test_a_store_that_one_rank_lost(model: Path, tiers: dict[str, Any], tmp_path: Path) -> None:
    """Blocks that only one rank has do not count, and are not there the next time either."""
    prompts = make_prompts(1)
    wanted = expected(model, prompts)
    with engine(model, 2, **tiers) as core:
        run(core, prompts)
        own = next(line for line in core.info.tiers if line.startswith("nvme"))
    (lost,) = [s.path for s in list_stores(tmp_path) if str(s.path) not in own]
    (lost / "MANIFEST").unlink()
    with engine(model, 2, **tiers) as core:
        assert len(core.cache.tree) == 0
        assert run(core, prompts) == wanted


@pytest.mark.full
def test_a_served_engine_notices_a_death_while_idle(model: Path) -> None:
    config = EngineConfig(model=str(model), tensor_parallel_size=2, num_gpu_blocks=40)
    deaths: list[EngineDeadError] = []

    class Owner:
        def message(self, kind: str, values: list[Any]) -> None: ...

        def death(self, error: EngineDeadError) -> None:
            deaths.append(error)

    owner, client = Owner(), EngineClient(config)
    client.listen(owner.message, owner.death)
    (worker,) = children_of(client.process.pid)
    os.kill(worker, signal.SIGKILL)
    assert until(lambda: bool(deaths))
    assert "worker of rank 1 ended (SIGKILL)" in str(deaths[0])
    client.close()


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.full
def test_an_engine_that_dies_takes_its_workers_along(model: Path) -> None:
    client = EngineClient(EngineConfig(model=str(model), tensor_parallel_size=2, num_gpu_blocks=40))
    (worker,) = children_of(client.process.pid)
    client.process.kill()
    assert until(lambda: has_ended(worker))
    client.close()


@pytest.mark.full
def test_a_plain_script_needs_no_main_guard(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tierkv import LLM, SamplingParams\n"
        f"llm = LLM({str(model)!r}, tensor_parallel_size=2, num_gpu_blocks=40)\n"
        "params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)\n"
        "(out,) = llm.generate([{'prompt_token_ids': [1, 2, 3]}], params, use_tqdm=False)\n"
        "print('found', len(out.outputs[0].token_ids))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "found 3" in done.stdout
