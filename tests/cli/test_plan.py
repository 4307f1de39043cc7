"""`tierkv plan`: the published figures, every attention kind, every tier."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tierkv.cli.main import main
from tierkv.cli.model_facts import read_facts
from tierkv.cli.plan import PlanOptions, make_plan, size_text
from tierkv.cli.shapes import BUILT_IN
from tierkv.errors import ConfigError, UnsupportedModelError

KIB, GIB = 2**10, 2**30

MHA_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def write_config(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**MHA_CONFIG, **changes}))
    return directory


def test_llama_3_70b_is_320_kib_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "llama-3-70b", "--context", "8192", "--sequences", "128")
    assert plan["bytes_per_token"]["bfloat16"]["GQA"] == 320 * KIB
    assert plan["total_bytes"] == 320 * GIB


def test_opt_6_7b_is_32_gib(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "opt-6.7b", "--context", "4096", "--sequences", "16")
    assert plan["total_bytes"] == 32 * GIB


def test_kinds_and_dtypes_are_in_proportion(capsys: pytest.CaptureFixture[str]) -> None:
    per_token = plan_json(capsys, "llama-3-70b")["bytes_per_token"]
    for kinds in per_token.values():
        assert kinds["MHA"] == 8 * kinds["GQA"] == 64 * kinds["MQA"]
    sizes = [per_token[dtype]["GQA"] for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int4")]
    assert sizes == [640 * KIB, 320 * KIB, 160 * KIB, 80 * KIB]


def test_names_of_the_hub_are_known_too() -> None:
    assert read_facts("Meta-Llama/Llama-3-8B").num_kv_heads == 8


def test_a_multi_query_model(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "falcon-7b")
    assert plan["model"]["attention"] == "MQA"
    assert plan["bytes_per_token"]["bfloat16"]["MQA"] == 32 * 2 * 64 * 2


def test_tiers_hold_whole_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(
        capsys, "llama-3-8b", "--context", "8000", "--gpu-memory", "24GiB", "--cpu-memory", "64GiB",
        "--nvme", "1TB",
    )  # fmt: skip
    gpu, cpu, nvme = plan["tiers"]
    assert [gpu["tier"], cpu["tier"], nvme["tier"]] == ["gpu", "cpu", "nvme"]
    assert gpu["kv_bytes"] == int(24 * GIB * 0.9) - plan["model"]["weights_bytes"]
    assert cpu["blocks"] == 64 * GIB // (2 * 2**20)
    assert cpu["tokens"] == cpu["blocks"] * 16
    assert cpu["sequences"] == cpu["blocks"] // 500
    assert nvme["kv_bytes"] == 10**12


def test_weights_that_do_not_fit_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-70b", "--gpu-memory", "80GiB"]) == 0
    shown = capsys.readouterr().out
    assert "the weights alone do not fit" in shown
    assert re.search(r"gpu +0 B +0 +0 +0$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gemma-2-9b", "21 of 42 layers see a window of 4,096 tokens only"),
        ("mistral-7b", "every layer sees a window of at most 4,096 tokens"),
    ],
)
def test_windows_are_explained(model: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model]) == 0
    assert words in capsys.readouterr().out


def test_models_without_windows_have_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_json(capsys, "llama-3-8b")["notes"] == []


def test_what_the_engine_would_refuse_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    (note,) = plan_json(capsys, "opt-6.7b", "--context", "4096")["notes"]
    assert "positions end at 2,048" in note
    assert main(["plan", "opt-6.7b", "--block-size", "24"]) == 2
    assert "--block-size 24: must be a power of two" in capsys.readouterr().err


def test_a_directory_with_weights_counts_them_as_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    file = len(header).to_bytes(8, "little") + header + bytes(12)
    (write_config(tmp_path) / "model.safetensors").write_bytes(file)
    plan = plan_json(capsys, str(tmp_path))
    assert plan["model"]["weights_bytes"] == 12
    assert plan["bytes_per_token"]["float32"] == {"MHA": 2 * 2 * 64 * 4, "MQA": 2 * 2 * 16 * 4}
    assert plan_json(capsys, str(tmp_path / "config.json")) | {"model": 0} == plan | {"model": 0}


def test_without_weights_parameters_are_counted(tmp_path: Path) -> None:
    facts = read_facts(str(write_config(tmp_path, tie_word_embeddings=True)))
    attention, mlp, norms = 4 * 64 * 64, 3 * 64 * 96, 2 * 64
    expected = 100 * 64 + 2 * (attention + mlp + norms) + 64
    assert facts.weights_bytes == expected * 4


def test_short_names_of_dtypes() -> None:
    facts = read_facts("llama-3-8b")
    for short, long in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp8", "float8_e4m3fn")):
        assert make_plan(facts, PlanOptions(kv_dtype=short)).kv_dtype == long


def test_a_partly_filled_block_counts_whole() -> None:
    facts = read_facts("llama-3-8b")
    plan = make_plan(facts, PlanOptions(context=17))
    assert plan.sequence_bytes == 2 * plan.block_bytes


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"context": 0}, "context"),
        ({"sequences": -1}, "sequences"),
        ({"gpu_memory": "lots"}, "gpu_memory"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"kv_dtype": "fp3"}, "kv_dtype"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlanOptions(**options)
    assert caught.value.option == name


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_facts(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_facts(str(tmp_path))
    write_config(tmp_path, model_type="no-such-architecture")
    with pytest.raises(ConfigError, match="cannot build this model"):
        read_facts(str(tmp_path))
    write_config(tmp_path, num_attention_heads=None)
    with pytest.raises(UnsupportedModelError, match="num_attention_heads"):
        read_facts(str(tmp_path))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (320 * KIB, "320 KiB"),
        (2**60, "1.049e+06 TiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert size_text(size) == text


def test_known_models_need_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from tierkv.cli.main import main; main(['plan', 'llama-3-8b'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, check=True)


def test_every_known_model_has_a_plan() -> None:
    assert len(BUILT_IN) > 25
    for name in BUILT_IN:
        plan = make_plan(read_facts(name), PlanOptions())
        assert plan.total_bytes > 0
