"""Engines with lower tiers come and go: memory, files, threads and locks go with them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tier_victim import config
from tiny_models import save_model

from tierkv import LLM, SamplingParams
from tierkv.engine.build import build_engine
from tierkv.engine.calibrate import measure_compute
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.errors import ConfigError
from tierkv.model.loader import load_model
from tierkv.storage.lock import holder

MOVERS = ("tierkv-down", "tierkv-up", "tierkv-write", "tierkv-read")
ROUNDS = 20
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = {"prompt_token_ids": list(range(100))}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def maps() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def threads() -> list[str]:
    """Those of movers; other tests may have left an engine process with a thread that listens."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(MOVERS)]


def store_below(path: Path) -> Path:
    (found,) = [child for child in path.iterdir() if child.is_dir()]
    return found


def options(store: Path, **more: Any) -> dict[str, Any]:
    small = {"num_gpu_blocks": 64, "num_threads": 1, "verify_model": False, "dtype": "float32"}
    return {"offload": "cpu=4MiB,nvme=64MiB", "nvme_path": str(store), **small, **more}


@pytest.mark.parametrize(
    "is_closed",
    [pytest.param(True, id="closed"), pytest.param(False, id="dropped", marks=pytest.mark.full)],
)
def test_nothing_is_left_of_many_engines(is_closed: bool, servable: Path, tmp_path: Path) -> None:
    """Also of those that nobody closed: the next one can have the store."""
    seen: list[tuple[int, int]] = []
    for _ in range(ROUNDS):
        llm = LLM(str(servable), **options(tmp_path))
        (output,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 4
        if is_closed:
            llm.close()
            assert holder(store_below(tmp_path)) == "nobody"
        del llm, output
        gc.collect()
        assert threads() == []
        seen.append((open_files(), maps()))
    files, ranges = zip(*seen[ROUNDS // 4 :], strict=True)
    assert files[-1] <= files[0], files
    assert ranges[-1] <= ranges[0] + ROUNDS // 2, ranges
    assert holder(store_below(tmp_path)) == "nobody"


def test_a_program_that_ends_without_closing_leaves_a_sealed_store(
    servable: Path, tmp_path: Path
) -> None:
    """The next start reads the index, not every header."""
    program = (
        "import logging, sys; from tierkv import LLM, SamplingParams\n"
        "logging.basicConfig(level=logging.INFO)\n"
        f"llm = LLM({str(servable)!r}, **{options(tmp_path)!r})\n"
        f"out = llm.generate([{PROMPT!r}], SamplingParams(max_tokens=4), use_tqdm=False)\n"
        "print('cached', out[0].num_cached_tokens)\n"
    )
    for expected in ("nowhere", "from index"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
        assert holder(store_below(tmp_path)) == "nobody"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eviction_policy", "gpu=none-such"),
        ("eviction_policy", "nvme=none-such"),
        ("scheduling_policy", "none-such"),
        ("preemption_mode", "none-such"),
    ],
)
def test_an_engine_that_cannot_be_made_lets_the_store_go(
    name: str, value: str, servable: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(servable), **options(tmp_path, **{name: value}))
    assert caught.value.option == name
    gc.collect()
    assert threads() == []
    assert holder(store_below(tmp_path)) == "nobody"


@pytest.mark.parametrize("max_model_len", [5, 33])
def test_models_with_little_room(max_model_len: int, tmp_path: Path) -> None:
    """The first measurement computes no more tokens than the model has positions."""
    model = save_model("gpt2", tmp_path / "model", max_position_embeddings=max_model_len)
    settings = config(str(model), offload="cpu=1MiB", num_gpu_blocks=16)
    loaded = load_model(settings)
    cost = measure_compute(loaded, loaded.layout(4))
    assert cost.per_token_s > 0 and cost.per_pair_s > 0
    core = build_engine(settings)
    assert core.info.max_model_len == max_model_len
    assert len(tokens_of(core, list(range(max_model_len - 1)))) == 1
    core.close()


def tokens_of(core: EngineCore, prompt: list[int]) -> list[int]:
    core.add_request(EngineRequest("a", prompt, PARAMS))
    found: list[int] = []
    while core.has_work:
        for output in core.step():
            found += output.new_token_ids
    return found


def test_an_engine_that_failed_can_be_closed(
    servable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a step was done: nothing more is moved, and the store is let go."""
    core = EngineCore.from_config(config(str(servable), **options(tmp_path)))
    core.add_request(EngineRequest("a", list(range(60)), PARAMS))
    core.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("the model fails")

    monkeypatch.setattr(core.steps.executor, "run", fail)
    with pytest.raises(RuntimeError, match="the model fails"):
        core.step()
    core.close()
    core.close()
    assert threads() == []
    assert holder(store_below(tmp_path)) == "nobody"
