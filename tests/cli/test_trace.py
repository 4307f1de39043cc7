"""`tierkv trace`: what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from tierkv.cli.main import main
from tierkv.cli.trace_record import TraceBuilder, record
from tierkv.sim.generate import generate_trace
from tierkv.sim.trace import TraceRequest
from tierkv.sim.trace_writer import write_trace
from tierkv.sim.traces import read_trace

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 9]},
    {"timestamp": 0, "input_length": 0, "output_length": 7, "hash_ids": []},
    {"timestamp": 700_000, "input_length": 1600, "output_length": 9, "hash_ids": [4, 5, 6, 7]},
]


@pytest.fixture
def mooncake(tmp_path: Path) -> str:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in MOONCAKE))
    return str(path)


def test_info_counts(mooncake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "info", mooncake, "--json"]) == 0
    out, err = capsys.readouterr()
    found: dict[str, Any] = json.loads(out)
    expected = {
        **{"name": "m", "block_size": 512, "requests": 2, "sessions": 0, "span_s": 700.0},
        **{"blocks": 5, "unique_blocks": 3, "reused_blocks": 2, "working_set_blocks": 3},
        **{"bad_lines": 1, "hit_rate": 1024 / 2700},
    }
    assert {name: found[name] for name in expected} == expected
    assert found["input_tokens"]["most"] == 1600 and found["output_tokens"]["total"] == 16
    assert f"skipped {mooncake}:2: input_length: found 0" in err


def test_info_for_people(mooncake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "info", mooncake, "--limit", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["requests", "1"] in lines and ["working", "set,", "10", "min", "2", "blocks"] in lines


def test_only_the_first_problems_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(MOONCAKE[0]) + "\n" + "{\n" * 30)
    assert main(["trace", "info", str(path)]) == 0
    err = capsys.readouterr().err
    assert err.count("skipped ") == 10 and "... and 20 more" in err
    assert main(["trace", "info", str(path), "--max-bad-lines", "29"]) == 1
    assert f"{path}: over 29 bad lines" in capsys.readouterr().err


def test_convert_and_read_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "azure.csv", tmp_path / "out.jsonl.gz"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2024-05-10 00:00:0{i}.5+00:00,200,10" for i in range(5)]
    source.write_text("\n".join(rows))
    words = ["--block-size", "32", "--shared-prefix-tokens", "64", "--num-shared-prefixes", "1"]
    assert main(["trace", "convert", str(source), *words, "-o", str(target)]) == 0
    assert "5 requests; 0 bad lines" in capsys.readouterr().out
    found = read_trace(target, most_problems=0)
    requests = list(found)
    assert found.block_size == 32 and [r.arrival_s for r in requests] == [0, 1, 2, 3, 4]
    assert len({r.block_ids()[1] for r in requests}) == 1
    assert len({r.block_ids()[2] for r in requests}) == 5


def test_generate_writes_what_the_generator_makes(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    words = ["--requests", "30", "--seed", "4", "--turns", "2.5", "--num-tenants", "2"]
    assert main(["trace", "generate", "rag", *words, "-o", str(path)]) == 0
    expected = generate_trace("rag", num_requests=30, seed=4, turns=2.5, num_tenants=2)
    assert list(read_trace(path)) == list(expected)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["info", "no-such-file"], 1, "no-such-file: cannot be read"),
        (["info", "{m}", "--format", "text"], 1, "no usable request"),
        (["info", "{m}", "--block-size", "0"], 2, "--block-size 0: must be at least 1"),
        (["info", "{m}", "--limit", "0"], 2, "--limit 0"),
        (["info", "{m}", "--formats", "x"], 2, "did you mean --format?"),
        (["convert", "{m}", "-o", "{m}"], 2, "is the trace itself"),
        (["convert", "{m}"], 2, "--out"),
        (["generate", "poems", "-o", "x"], 2, "chat"),
        (["generate", "chat", "--turns", "0", "-o", "x"], 2, "--turns 0.0: must be from 1"),
        (["generate", "chat", "--requests", "0", "-o", "x"], 2, "error: --requests 0: must"),
        (["generate", "chat", "-o", "{m}/x"], 2, "cannot be written"),
        (["record", "--duration", "0", "-o", "x"], 2, "--duration 0.0"),
        (["record", "--url", "http://127.0.0.1:1", "-o", "{m}.new"], 1, "no answer from"),
        ([], 2, "ACTION"),
    ],
)
def test_refusals(
    words: list[str], status: int, told: str, mooncake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["trace", *(word.format(m=mooncake) for word in words)]
    try:
        found = main(arguments)
    except SystemExit as end:
        found = int(str(end.code))
    assert found == status
    assert told in capsys.readouterr().err
    assert [path.name for path in Path(mooncake).parent.iterdir()] == ["m.jsonl"]


# -- recording -------------------------------------------------------------------------------------


def request_line(arrival_s: float, blocks: list[int], **fields: Any) -> dict[str, Any]:
    rest = {"session": "", "turn": 0, "stop": "", "tenant": "", "priority": 0, "aborted": False}
    digits = "".join(f"{block:016x}" for block in blocks)
    lengths = {"input_tokens": 16 * len(blocks) + 3, "output_tokens": 2}
    return {"type": "request", "arrival_s": arrival_s, "blocks": digits, **lengths, **rest} | fields


def mark(until_s: float, running: int = 0, dropped: int = 0) -> dict[str, Any]:
    return {"type": "mark", "until_s": until_s, "running": running, "dropped": dropped}


def test_a_recording_is_written_by_arrival() -> None:
    out = io.StringIO()
    builder = TraceBuilder(out)
    builder.take({"type": "start", "block_size": 16})
    builder.take(request_line(3.0, [2**63 + 5, 77, 78]))
    builder.take(mark(1.0, running=1))
    assert out.getvalue() == "" and builder.found.num_running == 1
    builder.take(request_line(1.0, [2**63 + 5, 9], session="ab", turn=2, stop="end", tenant="c"))
    builder.take(mark(3.0))
    assert len(out.getvalue().splitlines()) == 1
    builder.take({"type": "a kind of later versions"})
    builder.take({"type": "end", "reason": "the server is stopping"})
    found = builder.finish()
    assert (found.num_written, found.num_dropped, found.reason) == (2, 0, "the server is stopping")
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first["timestamp"] == 1000 and first["session_id"] == "ab" and first["stop"] == "end"
    assert second["hash_runs"] == [[0, 3]] and first["hash_runs"] == [[0, 1], [3, 1]]


def test_what_was_recorded_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with path.open("w") as out:
        builder = TraceBuilder(out)
        builder.take({"type": "start", "block_size": 16})
        for number in range(20):
            builder.take(request_line(number / 7, [*range(number + 1)]))
        builder.take(mark(100.0, dropped=3))
        assert builder.finish().num_dropped == 3
    found = list(read_trace(path, most_problems=0))
    assert [request.runs for request in found] == [((0, n + 1),) for n in range(20)]


def test_a_written_trace_converts_to_itself(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    requests = [TraceRequest(1.25, 20, 3, ((7, 1),), "s", 1, "tool_call", "t", -2)]
    trace = generate_trace("chat", num_requests=1)
    trace.block_size, trace.open = 16, lambda: iter(requests)
    write_trace(trace, first)
    assert main(["trace", "convert", str(first), "-o", str(second)]) == 0
    assert second.read_bytes() == first.read_bytes() and list(read_trace(second)) == requests


class Broadcast:
    """Stands for a server: its recording is these lines, and then an error."""

    def __init__(self, lines: list[dict[str, Any]], ending: BaseException) -> None:
        self._lines, self._ending = lines, ending

    @contextmanager
    def open(self, path: str, timeout_s: float) -> Iterator[Iterator[bytes]]:
        assert path == "/kv/record" and timeout_s > 1

        def lines() -> Iterator[bytes]:
            for line in self._lines:
                yield json.dumps(line).encode()
            raise self._ending

        yield lines()


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (KeyboardInterrupt(), ""),
        (TimeoutError("timed out"), "the connection broke: timed out"),
        (IncompleteRead(b""), "the connection broke: IncompleteRead(0 bytes read)"),
    ],
)
def test_however_it_ends_what_came_is_written(ending: BaseException, reason: str) -> None:
    lines = [{"type": "start", "block_size": 16}, request_line(1.0, [3]), mark(0.5, running=4)]
    server: Any = Broadcast(lines, ending)
    out = io.StringIO()
    found = record(server, out, None)
    assert (found.num_written, found.num_running, found.reason) == (1, 4, reason)
    assert len(out.getvalue().splitlines()) == 1


def test_a_recording_ends_in_time() -> None:
    lines = [{"type": "start", "block_size": 16}, mark(0.5), request_line(1.0, [3])]
    server: Any = Broadcast(lines, AssertionError("it reads on"))
    assert record(server, io.StringIO(), 1e-9).num_written == 0
