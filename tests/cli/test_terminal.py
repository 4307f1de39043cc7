"""`tierkv generate` and `tierkv chat` on a tiny model."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tierkv import LLM, SamplingParams
from tierkv.cli.main import main

SMALL = ("--num-gpu-blocks", "128", "--num-threads", "1", "--no-verify-model")


@pytest.fixture(scope="module")
def expected(servable: Path) -> str:
    """What the model says after "hello", greedily."""
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(str(servable), num_gpu_blocks=128, num_threads=1) as llm:
        return llm.generate("hello", params, use_tqdm=False)[0].outputs[0].text


def generate(servable: Path, *arguments: str) -> int:
    options = ("--model", str(servable), "--temperature", "0", "--max-tokens", "12", *SMALL)
    return main(["generate", *arguments, *options])


def test_generate_prints_what_the_library_returns(
    servable: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(servable, "hello") == 0
    assert capsys.readouterr().out == expected + "\n"


def test_generate_reads_standard_input(
    servable: Path,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert generate(servable) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_generate_refuses_bad_values_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--model", "none", "--top-p", "2"]) == 1
    assert "top_p=2.0: must be between" in capsys.readouterr().err
    assert main(["generate", "x", "--model", "none", "--max-num-seqs", "0"]) == 2
    assert "--max-num-seqs 0" in capsys.readouterr().err


def test_generate_refuses_an_empty_prompt(
    servable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(servable, "") == 1
    assert "prompt" in capsys.readouterr().err


def talk(
    servable: Path, lines: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What `tierkv chat` prints, cut at its prompts."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    options = ("--temperature", "0", "--max-tokens", "8", "--max-model-len", "100", *SMALL)
    assert main(["chat", str(servable), "--system", "be brief", *options]) == 0
    return capsys.readouterr().out.split("> ")[1:]


def test_chat_keeps_its_history_until_reset(
    servable: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "one\ntwo\n/reset\none\n/nothing\n\n/quit\nnever\n"
    first, second, reset, again, unknown, empty, end = talk(servable, lines, capsys, monkeypatch)
    assert first == again
    assert second != first
    assert (reset, empty, end) == ("", "", "")
    assert "unknown command /nothing" in unknown


def test_chat_survives_what_it_cannot_answer(
    servable: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"one\n{'x' * 200}\n/reset\none"
    first, refused, _, again, _ = talk(servable, lines, capsys, monkeypatch)
    assert "error: prompt" in refused and "max_model_len=100" in refused
    assert again == first


@pytest.mark.full
def test_ctrl_c_ends_an_answer_and_not_the_chat(servable: Path) -> None:
    whole = shown_answer(servable)
    # On a busy machine the answer may be over before the signal comes.
    assert any(len(shown_answer(servable, signal.SIGINT)) < len(whole) for _ in range(5))


def shown_answer(servable: Path, *signals: int) -> bytes:
    """What a chat shows of an answer of 1,900 tokens, during which signals come, and then the next
    prompt."""
    command = [
        *(sys.executable, "-P", "-m", "tierkv", "chat", str(servable), *SMALL),
        *("--ignore-eos", "--max-tokens", "1900", "--temperature", "0"),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as chat:
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        shown = chat.stdout.readline()  # what the commands are
        shown = chat.stdout.read(20)  # the prompt and the answer's first bytes
        assert shown.startswith(b"> ")
        for number in signals:
            chat.send_signal(number)
        chat.stdin.write(b"/quit\n")
        chat.stdin.close()
        rest = chat.stdout.read()
        assert chat.wait(60) == 0
    assert rest.endswith(b"\n> ")
    return rest
