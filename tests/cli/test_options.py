"""Flags, YAML and option classes agree; what is unknown is refused with the nearest name."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tierkv.cli import options
from tierkv.cli.options import Parser, add_config_flag, add_flags, read_options
from tierkv.config import EngineConfig, option
from tierkv.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class Sample:
    count: int = option(1, "a count, 100% whole")
    limit: int | None = option(None, "maybe a limit")
    share: float = option(0.5, "a share")
    size: int | str | None = option(None, "a size")
    is_quick: bool = option(True, "quick or not")
    names: list[str] | None = option(None, "some names")


def parse(*arguments: str, owner: type = Sample) -> dict[str, Any]:
    parser = Parser(prog="sample")
    add_config_flag(parser)
    add_flags(parser, owner)
    namespace, extras = parser.parse_known_args(arguments)
    if extras:
        parser.refuse(extras)
    return read_options(namespace, owner)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_only_what_was_given_comes_back() -> None:
    assert parse() == {}
    assert parse("--count", "3", "--no-is-quick") == {"count": 3, "is_quick": False}


def test_each_type_has_its_flag() -> None:
    arguments = ["--limit", "7", "--share", "1", "--size", "2GiB", "--names", "a", "--names", "b"]
    expected = {"limit": 7, "share": 1.0, "size": "2GiB", "names": ["a", "b"]}
    assert parse(*arguments) == expected


def test_every_engine_option_is_a_flag() -> None:
    parser = Parser(prog="all")
    add_flags(parser, EngineConfig)
    flags = set(parser._option_string_actions)
    assert {"--" + f.name.replace("_", "-") for f in fields(EngineConfig)} <= flags
    assert {"--no-enable-prefix-caching", "--no-verify-model"} <= flags
    assert "100% whole" in _help(Sample)


def _help(owner: type) -> str:
    parser = Parser(prog="help")
    add_flags(parser, owner)
    return parser.format_help()


@pytest.mark.parametrize(
    ("given", "nearest"), [("--coutn", "--count"), ("--no-is-quik", "--no-is-quick")]
)
def test_an_unknown_flag_names_the_nearest(
    given: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(given, "1")
    assert ending.value.code == options.USAGE_ERROR
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--coun", "1")
    assert "unknown option --coun" in capsys.readouterr().err


def test_yaml_takes_dashes_and_underscores_and_flags_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "is-quick: false\nnames: [x]\ncount: 5\nsize: 3\n")
    merged = parse("--config", path, "--count", "6")
    assert merged == {"is_quick": False, "names": ["x"], "count": 6, "size": 3}


def test_an_empty_yaml_file_sets_nothing(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("cuont: 1", "cuont", "did you mean count"),
        ("count: many", "count", "must be of type int"),
        ("count: true", "count", "must be of type int"),
        ("is_quick: 'no'", "is_quick", "must be of type bool"),
        ("limit: 1.5", "limit", "int or nothing"),
        ("- count", "config", "must map option names"),
        ("1: 2", "config", "must map option names"),
        ("a: [", "config", "is not YAML"),
        ("count: 1\nsize: 2\ncount: 3", "config", "count is given again in line 3"),
        ("is-quick: true\nis_quick: false", "config", "gives an option twice"),
    ],
)
def test_bad_yaml_names_the_option(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse("--config", write(tmp_path / "bad.yaml", text))
    assert caught.value.option == name


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"count: \xff")
    with pytest.raises(ConfigError, match="is not YAML"):
        parse("--config", str(tmp_path / "bad.yaml"))


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_whole_numbers_in_yaml_are_numbers(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", "share: 1")) == {"share": 1}


def test_model_is_given_once() -> None:
    values: dict[str, Any] = {}
    options.take_model(argparse.Namespace(MODEL="a"), values)
    assert values == {"model": "a"}
    with pytest.raises(ConfigError, match="give one of them"):
        options.take_model(argparse.Namespace(MODEL="a", model="b"), values)
