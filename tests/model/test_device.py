"""Which device a model runs on, and why not on another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_steps import load_tiny
from tiny_models import save_model

from tierkv.config import EngineConfig, parse_sizes
from tierkv.errors import ConfigError
from tierkv.model import device, loader
from tierkv.model.quantize import check_quantization, is_quantizable


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A torch that believes in a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def test_auto_takes_a_gpu_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    assert device.choose_device("auto") == device.choose_device("cuda") == torch.device("cuda", 0)
    assert device.choose_device("cpu") == torch.device("cpu")


def test_auto_leaves_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5))
    assert device.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"Some GPU has compute capability 7.5.*need 8.0"):
        device.choose_device("cuda")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tierkv\[cuda\]'"):
        device.choose_device("cuda")


@pytest.mark.parametrize("version", ["3.5.1", "2.9", "3.5.0+git12"])
def test_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ConfigError, match=rf"Triton {re.escape(version)} .* need 3\.6 or newer"):
        device.choose_device("cuda")


def test_a_triton_that_nobody_tried_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(monkeypatch, (9, 0))
    for version in ("3.6.0", "3.9.2"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, v=version: v)
        assert device.choose_device("cuda").type == "cuda"
    assert not caplog.records
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.0.0")
    assert device.choose_device("cuda").type == "cuda"
    assert "4.0.0 is newer" in caplog.text


def test_without_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA"):
        device.choose_device("cuda")
    assert device.choose_device("auto") == torch.device("cpu")


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no GPU can be used .*nvidia-smi"):
        device.choose_device("cuda")


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "cpu", "quantization": "fp8"}])
def test_refusals_come_before_the_model_is_read(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError) as caught:
        loader.load_model(EngineConfig(model="/not/there", **options))
    assert caught.value.option in options


@pytest.mark.parametrize("named", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_dtype_on_a_gpu_is_a_half(named: torch.dtype, tmp_path: Path) -> None:
    hf_config = load_tiny(save_model("llama", tmp_path)).config
    hf_config.dtype = named
    gpu0, wanted = torch.device("cuda", 0), torch.bfloat16 if named is torch.float32 else named
    assert loader._dtype(EngineConfig(), hf_config, gpu0) is wanted
    assert loader._dtype(EngineConfig(dtype="float32"), hf_config, gpu0) is torch.float32


def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class TooBig(torch.nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 2 << 30))
    with torch.device("meta"):
        model = TooBig(1 << 15, 1 << 15, bias=False)
    words = r"TooBig.*take 4\.00 GiB, cuda:0 has 2\.00 GiB, 1\.00 GiB of them free"
    with pytest.raises(ConfigError, match=words):
        loader._on(torch.device("cuda", 0), model)  # type: ignore[arg-type]


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantization(None, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"quantization.*fp8.*needs a GPU"):
        check_quantization("fp8", torch.device("cpu"))
    gpu(monkeypatch, (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8.9, this one has 8.0"):
        check_quantization("fp8", torch.device("cuda"))
    with pytest.raises(ConfigError, match="fp8"):
        EngineConfig(quantization="int3")


def test_layers_that_fp8_products_take() -> None:
    make = torch.nn.Linear
    assert is_quantizable(make(32, 48, dtype=torch.bfloat16))
    assert not is_quantizable(make(32, 48))
    assert not is_quantizable(make(32, 47, dtype=torch.bfloat16))
    assert not is_quantizable(torch.nn.Embedding(32, 48, dtype=torch.bfloat16))


def test_graph_sizes() -> None:
    assert parse_sizes("8,1,4,4", "cuda_graph_sizes") == (1, 4, 8)
    assert parse_sizes(16, "cuda_graph_sizes") == (16,)
    for wrong in ("", "0", "1,x", "-3", True):
        with pytest.raises(ConfigError, match="cuda_graph_sizes"):
            EngineConfig(cuda_graph_sizes=wrong)
