"""The YAML files in `configs/` are ones that `tierkv serve` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tierkv.cli.options import read_options, split_options
from tierkv.cli.serve import ServeOptions, make_parser
from tierkv.config import EngineConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_there_are_some() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_accepted(path: Path) -> None:
    namespace = make_parser().parse_args(["--config", str(path)])
    of_server, of_engine = split_options(
        read_options(namespace, ServeOptions, EngineConfig), ServeOptions
    )
    ServeOptions(**of_server)
    assert EngineConfig(**of_engine).model == "demo"
    assert f"tierkv serve --config configs/{path.name}" in path.read_text(encoding="utf-8")
