"""Flags that users of other servers know: taken where they mean the same, else answered."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tierkv.cli import foreign
from tierkv.cli.main import main
from tierkv.cli.options import flag_name, is_own
from tierkv.cli.serve import make_parser, read
from tierkv.errors import ConfigError

SAME_MEANING = shlex.split("""
--host 0.0.0.0 --port 80 --api-key k --served-model-name a b --tokenizer t --dtype bfloat16
--max-model-len 100 --max-num-seqs 5 --max-num-batched-tokens 512 --gpu-memory-utilization 0.5
--block-size 32 --enable-prefix-caching --scheduling-policy priority --chat-template {{x}}
--enable-auto-tool-choice --tool-call-parser hermes --seed 1 --load-format auto --revision r
--trust-remote-code --uvicorn-log-level info --disable-log-requests --enable-log-requests
--otlp-traces-endpoint http://localhost:4318/v1/traces --no-enable-prefix-caching
""")


def parse(*arguments: str) -> Any:
    return make_parser().parse_args(arguments)


def test_flags_of_vllm_that_mean_the_same_are_options() -> None:
    options, config = read(parse("some/model", *SAME_MEANING))
    assert options.served_model_name == ["a", "b"]
    assert (options.port, options.log_requests, options.tool_call_parser) == (80, True, "hermes")
    assert (config.model, config.block_size, config.max_num_seqs) == ("some/model", 32, 5)
    assert config.enable_prefix_caching is False


def test_underscores_are_dashes() -> None:
    options, config = read(parse("m", "--max_model_len=7", "--served_model_name", "a_b"))
    assert (config.max_model_len, options.served_model_name) == (7, ["a_b"])


@pytest.mark.parametrize("flag", sorted(set(foreign.advice())))
def test_a_foreign_flag_is_answered(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    is_switch = foreign.accepted().get(flag) == ()
    if is_switch:
        return
    with pytest.raises(SystemExit) as ending:
        main(["serve", flag, "17"])
    assert ending.value.code == 2
    words = capsys.readouterr().err
    assert f"error: {flag} is an option of " in words
    assert foreign.advice()[flag].partition(": ")[2] in words


@pytest.mark.parametrize("flag", sorted(foreign.accepted()))
def test_what_is_so_here_anyway_is_accepted(flag: str) -> None:
    for value in foreign.accepted()[flag] or ("",):
        words = [flag, value] if value else [flag]
        assert read(parse(*words)) == read(parse())


def test_advice_names_options_that_exist() -> None:
    own = {f for f, a in make_parser()._option_string_actions.items() if is_own(a)}
    for flag, text in foreign.advice().items():
        named = set(re.findall(r"--[a-z-]+[a-z]", text))
        assert named <= own, flag
        assert flag not in own


def test_no_flag_is_in_two_tables() -> None:
    flags = [f for table in foreign.TABLES.values() for key in table for f in key.split(",")]
    assert len(flags) == len(set(flags))


def test_foreign_flags_are_neither_shown_nor_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--swap-space" not in make_parser().format_help()
    with pytest.raises(SystemExit):
        main(["serve", "--swap-spac", "1"])
    assert "did you mean --swap-space" not in capsys.readouterr().err


# -- in YAML ---------------------------------------------------------------------------------------


def from_yaml(folder: Path, text: str) -> Any:
    path = folder / "serve.yaml"
    path.write_text(text, encoding="utf-8")
    return read(parse("--config", str(path)))


def test_a_file_written_for_vllm(tmp_path: Path) -> None:
    options, config = from_yaml(
        tmp_path,
        "model: m\ntensor-parallel-size: 1\nenforce-eager: true\nenable_chunked_prefill: true\n"
        "disable-log-requests: true\nmax-model-len: 9\nenable-lora: false\n",
    )
    assert (config.model, config.max_model_len, options.log_requests) == ("m", 9, False)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("swap-space: 4", "use --offload cpu=SIZE"),
        ("tp-size: 2", "use --tensor-parallel-size"),
        ("enable-lora: true", "adapters are not served"),
        ("hicache-ratio: 2", "use --offload cpu=SIZE"),
    ],
)
def test_a_foreign_option_in_a_file_is_answered(tmp_path: Path, line: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(advice)) as caught:
        from_yaml(tmp_path, line)
    assert flag_name(caught.value.option) in foreign.advice()


# -- what several options say together -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--enable-auto-tool-choice"], "also needs --tool-call-parser"),
        (["--request-timeout", "0"], "must be above 0"),
        (["--served-model-name", "a", "b"], "give MODEL before it"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(parse(*arguments))


@pytest.mark.parametrize("text", ["log-format: xml", "tool-call-parser: mistral"])
def test_choices_are_checked_in_files_too(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        from_yaml(tmp_path, text)


def test_the_key_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierkv.cli.serve import settings

    monkeypatch.setenv("TIERKV_API_KEY", "secret")
    assert settings(*read(parse())).api_key == "secret"
    assert settings(*read(parse("--api-key", "other"))).api_key == "other"
