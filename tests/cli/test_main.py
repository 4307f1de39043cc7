"""The command line as a whole: exit status and one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tierkv.cli.main import COMMANDS, main


def test_the_console_script_and_the_module_are_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "tierkv"
    for command in ([str(script)], [sys.executable, "-P", "-m", "tierkv"]):
        done = subprocess.run(
            [*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("tierkv ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main([command, "--help"])
    assert ending.value.code == 0
    assert f"tierkv {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sreve"], "did you mean serve?"),
        (["--vresion"], "did you mean --version?"),
        (["plan", "--contxt", "5"], "did you mean --context?"),
        (["plan", "demo", "more"], "unexpected argument 'more'"),
        (["plan", "--context", "many"], "invalid int value"),
        (["serve", "--dtype", "int3"], "invalid choice"),
    ],
)
def test_a_bad_command_line_is_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--block-size", "17"], "--block-size 17: must be a power of two"),
        (["serve", "--kv-cache-memory", "2XB"], "--kv-cache-memory 2XB: give bytes or a size"),
        (["serve", "--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["serve", "--chat-template", "none.jinja"], "--chat-template none.jinja: is no template"),
        (["serve", "a", "--model", "b"], "--model b: differs from MODEL a"),
        (["serve", "--host", "no.such.host.invalid"], "--host no.such.host.invalid: is no address"),
        (["plan", "no-such-model"], "--model no-such-model: is neither"),
    ],
)
def test_a_bad_option_is_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_no_command_shows_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -P -m tierkv plan llama-3-8b --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr
