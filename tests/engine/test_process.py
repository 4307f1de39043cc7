"""The engine process: what crosses the border, how it starts, and how each side dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_config

from tierkv.config import EngineConfig
from tierkv.engine import wire
from tierkv.engine.client import EngineClient
from tierkv.engine.core import EngineInfo, EngineRequest
from tierkv.engine.outputs import RequestMetrics, SequenceOutput
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    InvariantError,
    QueueFullError,
    RequestError,
    TierkvError,
    UnsupportedModelError,
)
from tierkv.types import FinishReason, Logprob

# -- messages ------------------------------------------------------------------------------------


def crossed(value: Any) -> Any:
    kind, (arrived,) = wire.unpack(wire.pack("kind", value))
    assert kind == "kind"
    return arrived


logprob_lists = st.lists(
    st.dictionaries(
        st.integers(0, 2**31), st.builds(Logprob, st.floats(-99, 0), st.integers(1, 10**6))
    ),
    max_size=3,
)
outputs = st.builds(
    SequenceOutput,
    request_id=st.text(),
    seq_id=st.integers(0, 2**40),
    index=st.integers(0, 1023),
    new_token_ids=st.lists(st.integers(0, 2**31)),
    logprobs=st.none() | logprob_lists,
    prompt_logprobs=st.none() | logprob_lists,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | st.integers(0, 2**31),
    num_cached_tokens=st.none() | st.integers(0, 2**31),
    metrics=st.none() | st.builds(RequestMetrics, st.floats(0, 1e9), st.floats(0, 1e9)),
)


@settings(max_examples=50, deadline=None)
@given(outputs)
def test_outputs_arrive_as_they_left(output: SequenceOutput) -> None:
    assert wire.decode_output(crossed(wire.encode_output(output))) == output


def test_requests_configs_and_infos_arrive_as_they_left() -> None:
    params = SamplingParams(
        n=2, stop=["é", "x"], logit_bias={7: -1.5}, seed=-(2**63), stop_token_ids=[3], logprobs=0
    )
    request = EngineRequest("id", [1, 2**31], params, -5, "salt", is_stepped=True)
    assert wire.decode_request(crossed(wire.encode_request(request))) == request
    config = EngineConfig(model="m", kv_cache_memory="2GiB", block_size=4, seed=3)
    assert EngineConfig.from_mapping(crossed(wire.encode_config(config))) == config
    info = EngineInfo("m", "t", 99, 300, [1, 2], 64, 8, "float32", "cpu", b"\x00\xff", 12)
    assert wire.decode_info(crossed(wire.encode_info(info))) == info


@pytest.mark.parametrize(
    "error",
    [
        RequestError("stop", ["a"], "fix it"),
        RequestError("prompt", "\ud800", "is not text"),
        RequestError("top_k", 2**70, "too large"),
        CapacityError("prompt", "<9 tokens>", "never fits"),
        QueueFullError("request", None, "later"),
        ConfigError("dtype", "float13", "choose another"),
        UnsupportedModelError("model", "mamba", "no attention"),
        InvariantError("a law is broken"),
        EngineDeadError("gone"),
        ValueError("something else"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_keep_their_type_and_fields(error: Exception) -> None:
    arrived = wire.decode_error(crossed(wire.encode_error(error)))
    if not isinstance(error, TierkvError):
        assert type(arrived) is EngineDeadError and "ValueError: something else" in str(arrived)
        return
    assert type(arrived) is type(error)
    if isinstance(error, RequestError) and isinstance(arrived, RequestError):
        assert (arrived.field, arrived.fix) == (error.field, error.fix)
    if isinstance(error, ConfigError) and isinstance(arrived, ConfigError):
        assert (arrived.option, arrived.value) == (error.option, error.value)


def test_what_does_not_fit_a_message_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="cannot be sent"):
        wire.pack("add", {"top_k": 2**70})
    with pytest.raises(RequestError, match="cannot be sent"):
        wire.pack("add", "\ud800")


# -- life and death ------------------------------------------------------------------------------


def config(model: Path | str, **options: Any) -> EngineConfig:
    values = {"dtype": "float32", "num_gpu_blocks": 32, "num_threads": 1, "verify_model": False}
    return EngineConfig.from_mapping({"model": str(model), **values, **options})


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def private_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sockets go to a folder of this test, which must be empty afterwards."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def test_a_failed_start_raises_its_own_error(
    tmp_path: Path, private_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_config("mamba", tmp_path / "mamba")
    with pytest.raises(UnsupportedModelError) as caught:
        EngineClient(config(model, load_format="dummy"))
    assert (caught.value.option, caught.value.value) == ("model", "mamba")
    assert "Traceback" not in capfd.readouterr().err  # the message says all there is to say


def test_an_engine_killed_while_it_starts(
    text_model: Path, private_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierkv.engine import client as module

    launch = module._launch

    def launch_and_kill(*arguments: Any) -> subprocess.Popen[bytes]:
        process = launch(*arguments)
        process.kill()
        return process

    monkeypatch.setattr(module, "_launch", launch_and_kill)
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        EngineClient(config(text_model))


PARENT = """
import sys, time
from tierkv.config import EngineConfig
from tierkv.engine.client import EngineClient
import tempfile
tempfile.tempdir = sys.argv[2]
client = EngineClient(EngineConfig(model=sys.argv[1], num_gpu_blocks=32, verify_model=False))
print(client.process.pid, flush=True)
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize(
    "ending", ["killed", pytest.param("exits without closing", marks=pytest.mark.full)]
)
def test_no_engine_outlives_its_front_end(ending: str, text_model: Path, private_tmp: Path) -> None:
    sleep_s = "0" if ending != "killed" else "60"
    command = [sys.executable, "-P", "-c", PARENT, str(text_model), str(private_tmp), sleep_s]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if ending == "killed":
            assert is_running(pid)
            os.kill(parent.pid, signal.SIGKILL)
        parent.wait(30)
        assert wait_until(lambda: not is_running(pid))
        assert wait_until(lambda: not any(private_tmp.iterdir()))
