"""Loading: what is found, what is chosen, and every refusal's words."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from model_steps import load_tiny
from safetensors.torch import load_file, save_file
from tiny_models import REFUSED, VOCAB_SIZE, save_config, save_model
from torch import nn

from tierkv.config import EngineConfig
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.kernels.linear import PackedLinear, can_pack
from tierkv.model import loader, probe
from tierkv.model.fuse import FusedLinear
from tierkv.model.loader import load_model


def test_a_directory(tmp_path: Path) -> None:
    loaded = load_tiny(save_model("qwen2-windowed", tmp_path))
    assert loaded.windows == (None, 12, 12)
    assert loaded.vocab_size == VOCAB_SIZE
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert loaded.max_model_len == 2048
    assert loaded.eos_token_ids == frozenset()
    assert loaded.tokenizer_path == str(tmp_path)
    layout = loaded.layout(32)
    assert layout.block_shape == (3, 2, 2, 32, 16)
    assert (layout.dtype, layout.windows) == ("float32", loaded.windows)
    assert not loaded.model.training


def test_options_that_override(tmp_path: Path) -> None:
    save_model("llama", tmp_path, eos_token_id=[3, 5])
    loaded = load_tiny(tmp_path, dtype="bfloat16", tokenizer="elsewhere", num_threads=2)
    assert loaded.tokenizer_path == "elsewhere"
    assert loaded.dtype is torch.bfloat16
    assert loaded.eos_token_ids == {3, 5}
    assert torch.get_num_threads() == 2


def test_fingerprint_is_of_weights_config_and_dtype(tmp_path: Path) -> None:
    first = load_tiny(save_model("llama", tmp_path / "a")).fingerprint
    assert load_tiny(save_model("llama", tmp_path / "b")).fingerprint == first
    assert load_tiny(tmp_path / "a", dtype="bfloat16").fingerprint != first
    assert load_tiny(save_model("llama", tmp_path / "c", seed=1)).fingerprint != first


def test_dummy_weights_need_a_config_only_and_follow_the_seed(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    one, same, other = (load_tiny(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    weight = one.model.model.layers[0].mlp.up_proj.weight
    assert 0.11 < float(weight.std()) < 0.13
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_dummy_weights_are_made_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path)
    found: list[set[str]] = []

    def placed(device: torch.device, model: nn.Module) -> nn.Module:
        found.append({weight.device.type for weight in model.parameters()})
        raise InterruptedError

    monkeypatch.setattr(loader, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(loader, "_on", placed)
    for load_format in ("dummy", "auto"):
        with pytest.raises(InterruptedError):
            load_tiny(tmp_path, load_format=load_format)
    assert found == [{"meta"}, {"cpu"}]


def test_memory_of_a_closed_engine_goes_before_a_model_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path)
    cycle = nn.Module()
    vars(cycle)["itself"], left = cycle, weakref.ref(cycle)

    def placed(device: torch.device, model: nn.Module) -> nn.Module:
        raise InterruptedError(left())

    monkeypatch.setattr(loader, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(loader, "_on", placed)
    gc.disable()
    try:
        del cycle
        assert left() is not None
        with pytest.raises(InterruptedError) as raised:
            load_tiny(tmp_path, load_format="dummy")
    finally:
        gc.enable()
    assert raised.value.args == (None,)


def test_dummy_weights_leave_the_global_random_state_alone(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    load_tiny(tmp_path, load_format="dummy", seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_weights_are_fused_and_packed_on_the_cpu(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    half = load_tiny(tmp_path, dtype="bfloat16").model.model.layers[0]
    full = load_tiny(tmp_path, dtype="float32").model.model.layers[0]
    assert type(full.mlp.up_proj) is type(full.mlp.down_proj) is nn.Linear
    assert isinstance(half.self_attn.q_proj, FusedLinear)
    if can_pack("cpu", torch.bfloat16):
        assert isinstance(half.self_attn.q_proj.group.linear, PackedLinear)
        assert isinstance(half.mlp.down_proj, PackedLinear)


@pytest.mark.parametrize(
    ("named", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_auto_dtype_is_the_configs(named: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    _edit_config(tmp_path, dtype=named)
    assert load_tiny(tmp_path, dtype="auto").dtype is dtype


def test_auto_float16_runs_in_another_dtype_on_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model("llama", tmp_path)
    _edit_config(tmp_path, dtype="float16")
    with caplog.at_level(logging.WARNING, logger="tierkv"):
        loaded = load_tiny(tmp_path, dtype="auto", device="cpu")
    assert loaded.dtype in (torch.bfloat16, torch.float32)
    assert "float16 is slow on CPUs" in caplog.text
    assert load_tiny(tmp_path, dtype="float16").dtype is torch.float16


def _edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", ["no-such-model", "some/where/else", "/not/there", "a b c"])
def test_unknown_models_name_the_option(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model='.*neither `demo`, a model directory, nor"):
        load_model(EngineConfig(model=name))


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_an_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "from_the_future"}')
    with pytest.raises(UnsupportedModelError, match="from_the_future"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="model="):
        load_model(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize("family", REFUSED)
def test_refusals_come_before_weights_are_read(family: str, tmp_path: Path) -> None:
    save_config(family, tmp_path)
    with pytest.raises(UnsupportedModelError):
        load_model(EngineConfig(model=str(tmp_path)))


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="weights cannot be read"):
        load_tiny(tmp_path)


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 weights \(model\.layers\.1\.mlp\.up_proj"):
        load_tiny(tmp_path)


def test_weights_without_a_place_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    load_tiny(tmp_path)
    (told,) = [r.getMessage() for r in caplog.records if r.name == "tierkv.model.loader"]
    assert told.startswith("9 weights in its files have no place (model.layers.2.")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"vocab_size": 300}, r"2 of its weights .* \(lm_head\.weight is \[211, 64\], not \[300"),
        ({"hidden_act": "unheard_of"}, "unheard_of"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot build it"),
    ],
)
def test_a_config_that_does_not_go_with_the_weights(
    values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save_model("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ConfigError, match=reason):
        load_tiny(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_generation_config_that_is_none(text: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="model="):
        load_tiny(tmp_path)


def test_a_truncated_weight_file(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="weights cannot be read"):
        load_tiny(tmp_path)


def test_a_device_without_kernels(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"device='cuda'.*use cpu"):
        load_tiny(tmp_path, device="cuda")
    assert load_tiny(tmp_path, device="auto").device == torch.device("cpu")


def test_the_probe_runs_unless_it_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path)
    monkeypatch.setattr(probe, "MAX_FLOAT32_DIFFERENCE", 0.0)
    with pytest.raises(UnsupportedModelError, match="verify_model=False"):
        load_tiny(tmp_path, verify_model=True)
    assert load_tiny(tmp_path, verify_model=False).layers
