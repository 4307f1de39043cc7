"""What docs/metrics.md says an engine counts is what it counts: every name, both ways."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_model

from tierkv import LLM, SamplingParams
from tierkv.metrics import kind_of
from tierkv.types import MoveFailure

POLICIES = {"gpu": "lru", "cpu": "s3fifo", "nvme": "gdsf"}
PROMETHEUS = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def table(repository: Path) -> list[tuple[list[str], str, str]]:
    """Rows of the table: names, kind, what they need."""
    rows = []
    for line in (repository / "docs/metrics.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert len(cells) == 4 and cells[3], line
            rows.append((re.findall(r"`(\w+)`", cells[0]), cells[1], cells[2]))
    return rows


def names_of(pattern: str, tiers: list[str]) -> list[str]:
    """The metrics that a documented name stands for."""
    if "S_D" in pattern:
        return [pattern.replace("S_D", "_".join(p)) for p in itertools.permutations(tiers, 2)]
    if pattern.endswith("CAUSE"):
        return [pattern.replace("CAUSE", cause.value) for cause in MoveFailure]
    if pattern.startswith("T_"):
        found = [f"{tier}_{pattern[2:]}" for tier in tiers]
        return [name.replace("POLICY", POLICIES[name.partition("_")[0]]) for name in found]
    return [pattern]


def documented(repository: Path, tiers: list[str]) -> dict[str, str]:
    """Name to kind, for an engine with these tiers."""
    has = {"": True, "tiers": len(tiers) > 1, "nvme": "nvme" in tiers}
    rows = [(names, kind) for names, kind, need in table(repository) if has[need]]
    found = [(n, kind) for names, kind in rows for p in names for n in names_of(p, tiers)]
    assert len(dict(found)) == len(found), "a name comes twice"
    return dict(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "tiers", [["gpu"], ["gpu", "cpu"], ["gpu", "nvme"], ["gpu", "cpu", "nvme"]]
)
def test_every_metric_is_documented_and_every_documented_one_is_there(
    tiers: list[str], repository: Path, model: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {}
    if len(tiers) > 1:
        options = {"offload": ",".join(tiers[1:]), "nvme_path": str(tmp_path)}
    llm = LLM(
        str(model),
        dtype="float32",
        num_gpu_blocks=64,
        verify_model=False,
        num_threads=1,
        cpu_cache_size="1MiB",
        nvme_cache_size="16MiB",
        eviction_policy="gpu=lru,cpu=s3fifo,nvme=gdsf",
        **options,
    )
    before = llm.metrics()
    params = SamplingParams(temperature=0, max_tokens=4)
    llm.generate([{"prompt_token_ids": list(range(40))}] * 2, params, use_tqdm=False)
    found = llm.metrics()
    expected = documented(repository, tiers)
    assert found.keys() == before.keys() == expected.keys()
    assert {name: kind_of(name) for name in found} == expected
    assert all(isinstance(value, int | float) for value in found.values())
    assert all(PROMETHEUS.fullmatch(f"tierkv_{name}") for name in found)
    assert all(found[n] >= before[n] for n, kind in expected.items() if kind == "counter")
    if len(tiers) > 1:
        used = found["gpu_blocks"] - found["gpu_blocks_free"]
        assert found["gpu_capacity_bytes"] * used == found["gpu_used_bytes"] * found["gpu_blocks"]
    llm.close()
